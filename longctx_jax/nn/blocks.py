"""The block: norm, mixer, residual, norm, MLP, residual; a gated unit has the first half only."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from longctx_jax.nn.channel_mix import RWKVChannelMix
from longctx_jax.nn.contract import Aux, Documents
from longctx_jax.nn.dropout import drop
from longctx_jax.nn.mlp import MLP
from longctx_jax.nn.norms import EPS, make_norm
from longctx_jax.ops.quarantine import find_poison, is_bad

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
    norm_eps: float = EPS

    def setup(self):
        """Makes the norms and the second half; a part that is never called has no parameters."""
        self.mixer_norm = make_norm(self.norm, self.dtype, self.norm_eps)
        if self.mlp == "none":
            return
        self.mlp_norm = make_norm(self.norm, self.dtype, self.norm_eps)
        if self.mlp in RECURRENT_MLPS:
            sizes = (self.d_ff, self.n_layers, self.dtype, self.output_scale)
            self.second: Any = RWKVChannelMix(*sizes, name="mlp")
        else:
            self.second = MLP(self.mlp, self.d_ff, self.dtype, self.output_scale, name="mlp")

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

        `layer` is the block's place in the stack, int32; None = 0. Tokens that are not finite are
        kept from the caches, and from other documents.
        """
        poison = None
        # Where x is of some tokens only, the layers read embeddings, and no token another one's x.
        if documents is not None and x.shape[1] == documents.index.shape[1]:
            poison = find_poison(is_bad(x), documents.reset)
            x = poison.clean(x)
        x, cache, aux = self.mix(x, cache, documents, layer=layer, train=train)
        x, cache = self.feed(x, cache, documents, layer=layer, train=train)
        return x if poison is None else poison.spread(x), cache, aux

    def mix(
        self,
        x: jax.Array,
        cache: Any,
        documents: Documents | None = None,
        *,
        layer: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Any, Aux]:
        """The first half, arguments as of the whole; of a BlockCache it extends the mixer's."""
        both = cache if isinstance(cache, BlockCache) else None
        own: Any = cache if both is None else both.mixer
        normed = self.mixer_norm(x)
        mixed, own, aux = self.mixer(normed, own, documents, layer=layer, train=train)
        cache = own if both is None else both._replace(mixer=own)
        return x + self._drop(mixed, train), cache, aux

    def feed(
        self,
        x: jax.Array,
        cache: Any,
        documents: Documents | None = None,
        *,
        layer: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, Any]:
        """The second half, arguments as of the whole; returns x unchanged if there is none."""
        if self.mlp == "none":
            return x, cache
        hidden = self.mlp_norm(x)
        if self.mlp in RECURRENT_MLPS:
            own = None if cache is None else cache.mlp
            y, own = self.second(hidden, own, documents, layer=layer)
            cache = None if cache is None else cache._replace(mlp=own)
        else:
            y = self.second(hidden)
        return x + self._drop(y, train), cache

    def _drop(self, x: jax.Array, train: bool) -> jax.Array:
        return drop(self, x, self.dropout, self.layer_drop, train=train)

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
