"""The block: norm, mixer, residual, norm, MLP, residual; a gated unit has the first half only."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from longctx_jax.nn.contract import Aux, Documents
from longctx_jax.nn.mlp import MLP
from longctx_jax.nn.norms import make_norm


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); dropout on what each half adds.

    Attributes:
        mixer: a module with `__call__(x, cache, documents, *, layer, train) -> (y, cache, aux)`,
            `init_cache(batch_size, max_len)`, and, if it keeps state without gradients in the
            collection "model_state", `update_state(state, statistics, key) -> state`.
        mlp: kind of the second half; "none" = a block of one half.
        dropout: probability, a number of what a half adds.
        layer_drop: probability, all that a half adds to a row.
    """

    mixer: nn.Module
    mlp: str
    d_ff: int
    norm: str
    dropout: float
    layer_drop: float
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
        if self.mlp == "none":
            return x, cache, aux
        hidden = make_norm(self.norm, self.dtype, "mlp_norm")(x)
        mlp = MLP(self.mlp, self.d_ff, self.dtype, self.output_scale, name="mlp")
        return x + self._drop(mlp(hidden), train), cache, aux

    def _drop(self, x: jax.Array, train: bool) -> jax.Array:
        if train and self.dropout > 0.0:
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        if train and self.layer_drop > 0.0:
            keep = 1.0 - self.layer_drop
            mask = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0], 1, 1))
            x = jnp.where(mask, x / keep, 0).astype(x.dtype)
        return x

    def init_cache(self, batch_size: int, max_len: int) -> Any:
        """Returns the mixer's empty cache."""
        return self.mixer.init_cache(batch_size, max_len)  # pyright: ignore

    def update_state(self, state: Any, statistics: Any, key: jax.Array) -> Any:
        """Returns the mixer's non-gradient state after an update that saw these statistics."""
        if not state:
            return state
        return {"mixer": self.mixer.update_state(state["mixer"], statistics, key)}  # pyright: ignore

    def describe_state(self, state: Any) -> dict[str, jax.Array]:
        """Returns metrics of the mixer's non-gradient state, leading axis layers."""
        return self.mixer.describe_state(state["mixer"]) if state else {}  # pyright: ignore
