"""A mixer from outside the library: each token gets the mean of the values so far."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from longctx_jax.nn.contract import Costs, Mixer, Sizes, no_aux
from longctx_jax.nn.mlp import dense


@dataclasses.dataclass(frozen=True)
class RunningMeanConfig:
    """`config.model.running_mean`: what the mean is multiplied by."""

    gain: float = 2.0


class RunningMean(nn.Module):
    """y_t = gain W_out (sum of v_s, s <= t) / (their number), v = W x, within the document."""

    sizes: Sizes
    config: RunningMeanConfig

    @nn.compact
    def __call__(self, x, cache, documents, *, layer=None, train=False):
        """Maps (x, (sum, number, document)) to the same."""
        value = dense(x.shape[-1], self.sizes.dtype, "value")(x)
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        index = jnp.zeros(x.shape[:2], int) if documents is None else documents.index
        seen = jnp.tril(index[:, :, None] == index[:, None, :]).astype(value.dtype)
        total, number = seen @ value, jnp.sum(seen, axis=-1)
        if cache is not None:
            goes_on = (index == cache[2][:, None]).astype(value.dtype)
            total += jnp.einsum("bt,bd->btd", goes_on, cache[0])
            number += goes_on * cache[1][:, None]
            cache = (total[:, -1], number[:, -1], index[:, -1])
        mean = (self.config.gain * total / number[..., None]).astype(self.sizes.dtype)
        out = dense(x.shape[-1], self.sizes.dtype, "out", self.sizes.output_scale)(mean)
        return out, cache, no_aux()

    def init_cache(self, batch_size, max_len):
        """Nothing seen yet."""
        wide = jnp.promote_types(self.sizes.dtype, jnp.float32)
        zeros = jnp.zeros((batch_size,), wide)
        total = jnp.zeros((batch_size, self.sizes.d_model), wide)
        return total, zeros, jnp.zeros((batch_size,), jnp.int32)


def _costs(sizes, config, call):
    products = 4 * sizes.d_model**2 + 2 * call.seq_len * sizes.d_model
    return Costs(products, rows=3 * sizes.d_model, scores=call.seq_len**2)


MIXER = Mixer(RunningMeanConfig, RunningMean, _costs, examples={"mean": {}})
