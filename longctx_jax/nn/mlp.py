"""Feed-forward halves of a block: SwiGLU (Shazeer 2020, arXiv 2002.05202), GELU, squared ReLU.

Source of relu2: So et al. (2021), arXiv 2109.08668 (Primer).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def dense(features: int, dtype: str, name: str, scale: float = 1.0) -> nn.Dense:
    """Returns a bias-free linear map whose output has variance scale^2 for unit-variance input."""
    init = nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
    return nn.Dense(features, use_bias=False, dtype=dtype, kernel_init=init, name=name)


class Kernel(nn.Module):
    """The weight of `dense` by itself, for products in another order."""

    features: int
    dtype: str

    @nn.compact
    def __call__(self, d_in: int) -> jax.Array:
        """Returns the weight, [d_in, features]."""
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        return self.param("kernel", init, (d_in, self.features), jnp.float32).astype(self.dtype)


class MLP(nn.Module):
    """down(silu(gate x) * up x) for "swiglu", down(f(up x)) with f gelu or relu^2 for others."""

    kind: str
    d_ff: int
    dtype: str
    output_scale: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., d_model] to the same."""
        up = dense(self.d_ff, self.dtype, "up")(x)
        if self.kind == "swiglu":
            hidden = jax.nn.silu(dense(self.d_ff, self.dtype, "gate")(x)) * up
        elif self.kind == "relu2":
            hidden = jax.nn.relu(up) ** 2
        else:
            hidden = jax.nn.gelu(up)
        return dense(x.shape[-1], self.dtype, "down", self.output_scale)(hidden)


# "rwkv": `channel_mix.py`, which has a state; "none": the block has no second half
MLPS = ("swiglu", "gelu", "relu2", "rwkv", "none")
