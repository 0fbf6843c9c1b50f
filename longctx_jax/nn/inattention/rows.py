"""From embeddings to what InAttention's layers start from, and to the rows they attend to."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from longctx_jax.nn.mlp import Kernel
from longctx_jax.nn.norms import RMSNorm
from longctx_jax.ops.position import RotaryScaling, rotate, sinusoid


class RowMaker(nn.Module):
    """Embeddings into the layers' input and the memory's rows.

    Attributes:
        position_gain: what the sinusoids are multiplied by at first; 0 = there are none.
        d_memory: width of the rows; that of the embedding = as it is.
        d_rotary: numbers appended to each, rotated by position.
    """

    position_gain: float
    d_memory: int
    d_rotary: int
    rope_theta: float
    rope_scaling: RotaryScaling
    norm_eps: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, places: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns x0 and rows of embeddings [batch, seq, d_model].

        Args:
            x: embeddings.
            positions: in the stream, int32 [batch, seq].
            places: in their documents, likewise.
        """
        if self.position_gain:
            start = nn.initializers.constant(self.position_gain)
            gain = self.param("position_gain", start, (), jnp.float32)
            wide = jnp.promote_types(x.dtype, jnp.float32)
            waves = sinusoid(places, x.shape[-1], self.rope_theta, wide)
            x = (x + gain * waves).astype(x.dtype)
        memory = RMSNorm(self.dtype, self.norm_eps, use_scale=False)(x)
        rows = memory
        if self.d_memory != x.shape[-1]:
            rows = memory @ Kernel(self.d_memory, self.dtype, name="down")(x.shape[-1])
        if self.d_rotary:
            turned = memory @ Kernel(self.d_rotary, self.dtype, name="rotary")(x.shape[-1])
            turned = rotate(turned[:, :, None], positions, self.rope_theta, self.rope_scaling)[
                :, :, 0
            ]
            rows = jnp.concatenate([rows, turned], axis=-1)
        return x, rows
