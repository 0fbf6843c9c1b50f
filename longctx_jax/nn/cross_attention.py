"""Cross-attention of a stack onto the one below it, which stands one token behind.

Row j of the memory belongs to token j and holds what the stack below made of the tokens before it,
so the ordinary causal rule (row j is seen by tokens i >= j) never shows a token its own depth.

Source: Cutler et al. (2025), arXiv 2501.15665 (StagFormer).
"""

from typing import NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.nn.contract import Documents
from longctx_jax.nn.dropout import drop
from longctx_jax.nn.kv_cache import (
    KVCache,
    NewTokens,
    cached_attention,
    extend,
    init_kv_cache,
)
from longctx_jax.nn.mlp import Kernel, dense
from longctx_jax.nn.norms import EPS, make_norm
from longctx_jax.ops.attention import Keys
from longctx_jax.ops.cache_attention import Cached, attend_cache, without_kernels
from longctx_jax.ops.position import UNSCALED, RotaryScaling, rotate

POSITIONS = ("rotary", "none")


@flax.struct.dataclass
class RowCache:
    """The last rows of a memory, in a ring like that of a KVCache."""

    rows: jax.Array  # [batch, capacity, d_model]
    slot_positions: jax.Array  # as in KVCache, like the rest
    slot_documents: jax.Array
    position: jax.Array

    def with_keys(self, key: jax.Array, value: jax.Array) -> KVCache:
        """Returns the KVCache whose keys and values [batch, heads, capacity, ...] these are."""
        return KVCache(key, value, self.slot_positions, self.slot_documents, self.position)


class MemoryRing(NamedTuple):
    """The rows that all layers above share, before and after the tokens of a call."""

    before: RowCache
    after: RowCache


def init_rows(batch_size: int, capacity: int, d_model: int, dtype: str) -> RowCache:
    """Returns an empty ring: capacity d_model numbers a batch row."""
    empty = init_kv_cache(batch_size, capacity, 1, d_model, 0, dtype)
    return RowCache(empty.key[:, 0], empty.slot_positions, empty.slot_documents, empty.position)


def extend_rows(ring: RowCache, memory: jax.Array, documents: Documents) -> MemoryRing:
    """Returns the ring before and after it takes in memory [batch, seq, d_model]."""
    before, new = ring.rows[:, None], memory[:, :, None]
    kept = extend(ring.with_keys(before, before[..., :0]), new, new[..., :0], documents.index)
    rows = RowCache(kept.key[:, 0], kept.slot_positions, kept.slot_documents, kept.position)
    return MemoryRing(ring, rows)


class CrossHalf(nn.Module):
    """x + cross-attention of norm(x) onto a memory that is normed already.

    Attributes:
        window_len: memory rows a token sees; 0 = all the cache holds. 1 = a linear map of the
            newest row, which is what a softmax over one key is.
        position: "rotary" or "none".
        delay: tokens between a row and the newest token it knows of: 1 if staggered, else 0. Only
            rotary positions need it.
    """

    n_heads: int
    n_kv_heads: int
    d_key: int
    d_value: int
    window_len: int
    position: str
    rope_theta: float
    delay: int
    implementation: str
    norm: str
    dropout: float
    layer_drop: float
    dtype: str
    output_scale: float
    rope_scaling: RotaryScaling = UNSCALED
    norm_eps: float = EPS

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array,
        cache: KVCache | MemoryRing | None,
        documents: Documents | None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, KVCache | NewTokens | MemoryRing | None]:
        """Maps [batch, seq, d_model] to the same; memory has one row a token.

        Args:
            x: of the stack above.
            memory: of the same tokens, [batch, seq, d_model].
            cache: own keys and values; or the rows that all layers share; None = nothing came
                before. A linear map has none: pass None.
            documents: of the tokens, and so of the memory's rows.
            train: drop out.
        """
        if self.window_len == 1:
            out = dense(x.shape[-1], self.dtype, "linear", self.output_scale)(memory)
            return x + self._drop(out, train), cache
        hidden = make_norm(self.norm, self.dtype, self.norm_eps, "norm")(x)
        query = dense(self.n_heads * self.d_key, self.dtype, "query")(hidden)
        query = query.reshape(*x.shape[:2], self.n_heads, self.d_key)
        to_key = Kernel(self.n_kv_heads * self.d_key, self.dtype, name="key")(x.shape[-1])
        to_value = Kernel(self.n_kv_heads * self.d_value, self.dtype, name="value")(x.shape[-1])
        if isinstance(cache, MemoryRing) and x.shape[1] == 1:
            out, kept = self._absorbed(query, to_key, to_value, cache.after, documents), cache
        else:
            out, kept = self._explicit(query, to_key, to_value, memory, cache, documents)
        out = out.reshape(*out.shape[:2], -1)
        out = dense(x.shape[-1], self.dtype, "out", self.output_scale)(out)
        return x + self._drop(out, train), kept

    def _explicit(self, query, to_key, to_value, memory, cache, documents):
        """Keys and values of every row; those of a shared ring are made anew."""
        shared = None
        if isinstance(cache, MemoryRing):
            shared, before = cache, cache.before
            # Nothing to project before the first token; rows that are there, at every call.
            key, value = jax.lax.cond(
                jnp.any(before.position > 0),
                lambda rows: (self._keys(rows, to_key), self._values(rows, to_value)),
                lambda rows: tuple(
                    jnp.zeros((*rows.shape[:2], self.n_kv_heads, width), self.dtype)
                    for width in (self.d_key, self.d_value)
                ),
                before.rows,
            )
            cache = before.with_keys(jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2))
        key, value = self._keys(memory, to_key), self._values(memory, to_value)
        if self.position == "rotary":
            positions = jnp.arange(memory.shape[1], dtype=jnp.int32)[None]
            if cache is not None:
                positions = cache.position[:, None] + positions
            query = rotate(query, positions + self.delay, self.rope_theta, self.rope_scaling)
            key = rotate(key, positions, self.rope_theta, self.rope_scaling)
        out, kept = cached_attention(
            query,
            key,
            value,
            cache,
            documents,
            window_len=self.window_len,
            relative_bias=None,
            implementation=self.implementation,
        )
        return out, kept if shared is None else shared

    def _absorbed(self, query, to_key, to_value, ring: RowCache, documents):
        """One token against the rows themselves: <q, M W_K> = <q W_K^T, M>, (P M) W_V = P (M W_V).

        Source: Yan et al. (2021), arXiv 2105.04779.
        """
        batch, seq, _, d_key = query.shape
        n_kv, d_model = self.n_kv_heads, to_key.shape[0]
        grouped = query.reshape(batch, seq, n_kv, -1, d_key)
        to_key = to_key.reshape(d_model, n_kv, d_key)
        absorbed = jnp.einsum("btgrk,dgk->btgrd", grouped, to_key).reshape(batch, seq, -1, d_model)
        positions = ring.position[:, None] - 1
        partial = attend_cache(
            absorbed,
            Cached(ring.rows[:, None], None, d_model),
            Keys(positions, ring.slot_positions, documents.index, ring.slot_documents),
            window_len=ring.rows.shape[1],
            scale=self.d_key**-0.5,
            implementation=without_kernels(self.implementation),
        )
        found = partial.out.reshape(batch, seq, n_kv, -1, d_model)
        to_value = to_value.reshape(d_model, n_kv, self.d_value)
        return jnp.einsum("btgrd,dgv->btgrv", found, to_value).reshape(batch, seq, -1, self.d_value)

    def _keys(self, memory, to_key):
        return (memory @ to_key).reshape(*memory.shape[:2], self.n_kv_heads, self.d_key)

    def _values(self, memory, to_value):
        return (memory @ to_value).reshape(*memory.shape[:2], self.n_kv_heads, self.d_value)

    def _drop(self, out, train: bool):
        return drop(self, out, self.dropout, self.layer_drop, train=train)

    def init_cache(self, batch_size: int, max_len: int) -> KVCache | None:
        """Returns an empty cache of keys and values; None for a linear map."""
        if self.window_len == 1:
            return None
        capacity = min(self.window_len or max_len, max_len)
        return init_kv_cache(
            batch_size, capacity, self.n_kv_heads, self.d_key, self.d_value, self.dtype
        )
