"""The block: norm, mixer, residual, norm, MLP, residual."""

from typing import Any

import flax.linen as nn
import jax

from longctx_jax.nn.contract import Aux, Documents
from longctx_jax.nn.mlp import MLP
from longctx_jax.nn.norms import make_norm


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); dropout on what each half adds.

    Attributes:
        mixer: a module with `__call__(x, cache, documents, *, layer, train) -> (y, cache, aux)` and
            `init_cache(batch_size, max_len)`.
    """

    mixer: nn.Module
    mlp: str
    d_ff: int
    norm: str
    dropout: float
    dtype: str
    output_scale: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: Any,
        documents: Documents | None = None,
        *,
        layer: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Any, Aux]:
        """Maps (x [batch, seq, d_model], cache) to (y, cache, aux); dropout needs its rng.

        `layer` is the block's place in the stack, int32; None = 0.
        """
        normed = make_norm(self.norm, self.dtype, "mixer_norm")(x)
        mixed, cache, aux = self.mixer(normed, cache, documents, layer=layer, train=train)
        x = x + self._drop(mixed, train)
        hidden = make_norm(self.norm, self.dtype, "mlp_norm")(x)
        mlp = MLP(self.mlp, self.d_ff, self.dtype, self.output_scale, name="mlp")
        return x + self._drop(mlp(hidden), train), cache, aux

    def _drop(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.dropout == 0.0:
            return x
        return nn.Dropout(self.dropout, deterministic=False)(x)

    def init_cache(self, batch_size: int, max_len: int) -> Any:
        """Returns the mixer's empty cache."""
        return self.mixer.init_cache(batch_size, max_len)  # pyright: ignore
