"""The block: norm, mixer, residual, norm, MLP, residual; a gated unit has the first half only."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from longctx_jax.nn.contract import Aux, Documents
from longctx_jax.nn.mlp import MLP
from longctx_jax.nn.norms import make_norm
from longctx_jax.nn.rwkv import RWKVChannelMix

RECURRENT_MLPS = ("rwkv",)  # have a cache of their own


class BlockCache(NamedTuple):
    """The caches of both halves, where the second half has one."""

    mixer: Any
    mlp: Any


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); dropout on what each half adds.

    Attributes:
        mixer: a module with `__call__(x, cache, documents, *, layer, train) -> (y, cache, aux)`,
            `init_cache(batch_size, max_len)`, and, if it keeps state without gradients in the
            collection "model_state", `update_state(state, statistics, key) -> state`.
        mlp: kind of the second half; "none" = a block of one half.
        dropout: probability, a number of what a half adds.
        layer_drop: probability, all that a half adds to a row.
        n_layers: of the stack, for initial values that depend on depth.
        d_model: width, for the cache of an MLP that has one.
    """

    mixer: nn.Module
    mlp: str
    d_ff: int
    norm: str
    dropout: float
    layer_drop: float
    dtype: str
    output_scale: float
    n_layers: int = 1
    d_model: int = 0

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
        mlp_cache = None
        if self.mlp in RECURRENT_MLPS and cache is not None:
            cache, mlp_cache = cache
        normed = make_norm(self.norm, self.dtype, "mixer_norm")(x)
        mixed, cache, aux = self.mixer(normed, cache, documents, layer=layer, train=train)
        x = x + self._drop(mixed, train)
        if self.mlp == "none":
            return x, cache, aux
        hidden = make_norm(self.norm, self.dtype, "mlp_norm")(x)
        if self.mlp in RECURRENT_MLPS:
            sizes = (self.d_ff, self.n_layers, self.dtype, self.output_scale)
            mlp = RWKVChannelMix(*sizes, name="mlp")
            y, mlp_cache = mlp(hidden, mlp_cache, documents, layer=layer)
            cache = None if cache is None else BlockCache(cache, mlp_cache)
        else:
            y = MLP(self.mlp, self.d_ff, self.dtype, self.output_scale, name="mlp")(hidden)
        return x + self._drop(y, train), cache, aux

    def _drop(self, x: jax.Array, train: bool) -> jax.Array:
        if train and self.dropout > 0.0:
            x = nn.Dropout(self.dropout, deterministic=False)(x)
        if train and self.layer_drop > 0.0:
            keep = 1.0 - self.layer_drop
            mask = jax.random.bernoulli(self.make_rng("dropout"), keep, (x.shape[0], 1, 1))
            x = jnp.where(mask, x / keep, 0).astype(x.dtype)
        return x

    def init_cache(self, batch_size: int, max_len: int) -> Any:
        """Returns the mixer's empty cache; a BlockCache if the MLP has one too."""
        cache = self.mixer.init_cache(batch_size, max_len)  # pyright: ignore
        if self.mlp in RECURRENT_MLPS:
            return BlockCache(cache, jnp.zeros((batch_size, self.d_model), self.dtype))
        return cache

    def update_state(self, state: Any, statistics: Any, key: jax.Array) -> Any:
        """Returns the mixer's non-gradient state after an update that saw these statistics."""
        if not state:
            return state
        return {"mixer": self.mixer.update_state(state["mixer"], statistics, key)}  # pyright: ignore

    def describe_state(self, state: Any) -> dict[str, jax.Array]:
        """Returns metrics of the mixer's non-gradient state, leading axis layers."""
        return self.mixer.describe_state(state["mixer"]) if state else {}  # pyright: ignore
