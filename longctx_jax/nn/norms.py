"""Root-mean-square and layer normalisation, computed in float32 whatever the input's dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def per_channel(weights: jax.Array, like: jax.Array) -> jax.Array:
    """Returns weights [width] with the axes of `like` [..., width]: no rank is promoted."""
    return weights.reshape(*[1] * (like.ndim - 1), -1)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale, over the last axis, or over n_groups equal parts of it.

    Source: Zhang & Sennrich (2019), arXiv 1910.07467.
    """

    dtype: str = "float32"
    eps: float = 1e-6
    use_scale: bool = True
    n_groups: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [..., width]; the result has the dtype of the module."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.n_groups > 1:
            wide = wide.reshape(*x.shape[:-1], self.n_groups, -1)
        y = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        y = y.reshape(x.shape)
        if self.use_scale:
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
            y = y * per_channel(scale, y)
        return y.astype(self.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias, over the last axis.

    Source: Ba et al. (2016), arXiv 1607.06450.
    """

    dtype: str = "float32"
    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [..., width]; the result has the dtype of the module."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(centred**2, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = y * per_channel(scale, y)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        y = y + per_channel(bias, y)
        return y.astype(self.dtype)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
EPS = 1e-6


def make_norm(kind: str, dtype: str, eps: float = EPS, name: str | None = None) -> nn.Module:
    """Returns the norm that config.model.norm names, with config.model.norm_eps."""
    return NORMS[kind](dtype=dtype, eps=eps, name=name)
