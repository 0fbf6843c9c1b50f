"""The key/value cache of exact attention: a ring buffer of the last `capacity` tokens.

Slot p % capacity holds the token at stream position p; each slot records its position and document,
so the visibility rule of `ops/attention` is the only mask. One cache serves full attention
(capacity = the longest context wanted) and sliding windows (capacity = window). A stream longer
than the capacity keeps going: attention then sees the last `capacity` tokens, at any split.

Heads come before slots: a head's keys are a matrix. A ring may be lent to the layers that read it:
`ring_lending.py`.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.nn.contract import Documents, own_documents
from longctx_jax.ops.attention import (
    NEVER,
    Keys,
    Partial,
    attention,
    attention_partial,
    attention_to_self,
    empty_partial,
    merge_partial_attention,
)
from longctx_jax.ops.cache_attention import Cached, attend_cache, without_kernels
from longctx_jax.ops.position import DistanceBias


@flax.struct.dataclass
class KVCache:
    """Keys and values of the last tokens of a stream, one row a batch entry."""

    key: jax.Array  # [batch, kv_heads, capacity, key]
    value: jax.Array  # [batch, kv_heads, capacity, value]
    slot_positions: jax.Array  # int32 [batch, capacity]; NEVER = empty
    slot_documents: jax.Array  # int32 [batch, capacity]
    position: jax.Array  # int32 [batch], of the next token
    is_lent: bool = flax.struct.field(pytree_node=False, default=False)
    stays_whole: bool = flax.struct.field(pytree_node=False, default=False)  # in loops over layers
    # Whose ring this is, int32 []; key and value are then those of all layers, [layers, batch, ...]
    layer: jax.Array | None = None

    @property
    def capacity(self) -> int:
        """Tokens it holds."""
        return self.slot_positions.shape[-1]


@flax.struct.dataclass
class NewTokens:
    """What a call adds to a ring."""

    key: jax.Array  # [batch, seq, kv_heads, key]
    value: jax.Array  # [batch, seq, kv_heads, value]
    documents: jax.Array  # int32 [batch, seq]


def init_kv_cache(
    batch_size: int, capacity: int, n_kv_heads: int, d_key: int, d_value: int, dtype: str
) -> KVCache:
    """Returns an empty cache of 2 capacity n_kv_heads (d_key + d_value) bytes a row in bfloat16."""
    return KVCache(
        key=jnp.zeros((batch_size, n_kv_heads, capacity, d_key), dtype),
        value=jnp.zeros((batch_size, n_kv_heads, capacity, d_value), dtype),
        slot_positions=jnp.full((batch_size, capacity), NEVER, jnp.int32),
        slot_documents=jnp.zeros((batch_size, capacity), jnp.int32),
        position=jnp.zeros((batch_size,), jnp.int32),
    )


def extend(cache: KVCache, key: jax.Array, value: jax.Array, documents: jax.Array) -> KVCache:
    """Returns the cache after appending tokens; of more than `capacity`, the last ones stay.

    Args:
        cache: the ring before.
        key: [batch, seq, kv_heads, key].
        value: [batch, seq, kv_heads, value].
        documents: numbered as those in the cache, int32 [batch, seq].
    """
    batch, seq = key.shape[:2]
    kept = min(seq, cache.capacity)
    positions = cache.position[:, None] + jnp.arange(seq - kept, seq, dtype=jnp.int32)[None]
    rows = jnp.arange(batch)[:, None]
    slots = positions % cache.capacity

    def write(buffer, new):  # the indices around the heads put [batch, seq] in front of them
        new = new[:, seq - kept :].astype(buffer.dtype)
        return buffer.at[rows, :, slots].set(new, unique_indices=True)

    def mark(buffer, new):
        return buffer.at[rows, slots].set(new, unique_indices=True)

    return dataclasses.replace(
        cache,
        key=write(cache.key, key),
        value=write(cache.value, value),
        slot_positions=mark(cache.slot_positions, positions),
        slot_documents=mark(cache.slot_documents, documents[:, seq - kept :]),
        position=cache.position + seq,
    )


def cached_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: KVCache | None,
    documents: Documents | None,
    *,
    window_len: int,
    relative_bias: DistanceBias | None,
    implementation: str,
) -> tuple[jax.Array, KVCache | NewTokens | None]:
    """Attends over the cached and the new tokens, and appends the new ones.

    Args:
        query: of the new tokens, [batch, seq, heads, key], rotated like key if at all.
        key: [batch, seq, kv_heads, key].
        value: [batch, seq, kv_heads, value].
        cache: what came before; its capacity is at most window_len. None = nothing, and nothing
            is wanted back.
        documents: of the new tokens, numbered as those in the cache, which needs them.
        window_len: tokens a query sees; 0 = as many as the cache holds.
        relative_bias: as in `attention`.
        implementation: for the new tokens among themselves; see `attend_ring` for the others.

    Returns:
        out [batch, seq, heads, value], and the extended cache; of a lent one, what is to be
        appended to it.
    """
    if cache is None:
        out = attention(
            query,
            key,
            value,
            segment_ids=own_documents(documents),
            window_len=window_len,
            relative_bias=relative_bias,
            implementation=implementation,
        )
        return out, None
    assert documents is not None
    seq, capacity = query.shape[1], cache.capacity
    positions = cache.position[:, None] + jnp.arange(seq, dtype=jnp.int32)[None]
    if cache.is_lent:
        kept: Any = NewTokens(key, value, documents.index)
    else:
        kept = extend(cache, key, value, documents.index)
    if seq == 1:
        old = attend_ring(query, cache, positions, documents.index, relative_bias, implementation)
        new = attention_to_self(query, key, value, relative_bias=relative_bias)
        return merge_partial_attention(new, old).out, kept

    segments = own_documents(documents)
    own = attention_partial(
        query,
        key,
        value,
        Keys(positions, positions, segments, segments),
        is_aligned=True,
        window_len=capacity if seq > capacity else window_len,
        relative_bias=relative_bias,
        implementation=implementation,
    )
    n_reaching = min(seq, capacity - 1)  # later queries are too far from every cached token
    if n_reaching == 0:
        return own.out, kept
    near = Partial(own.out[:, :n_reaching], own.log_normalizer[:, :n_reaching])

    def attend(_):
        return attend_ring(
            query[:, :n_reaching],
            cache,
            positions[:, :n_reaching],
            documents.index[:, :n_reaching],
            relative_bias,
        )

    old = jax.lax.cond(jnp.any(cache.position > 0), attend, lambda _: empty_partial(near), None)
    out = merge_partial_attention(near, old).out
    return jnp.concatenate([out, own.out[:, n_reaching:]], axis=1), kept


def attend_ring(
    query: jax.Array,
    cache: KVCache,
    positions: jax.Array,
    documents: jax.Array,
    relative_bias: DistanceBias | None,
    implementation: str = "auto",
) -> Partial:
    """Attends over what the ring holds.

    Args:
        query: [batch, seq, heads, key].
        cache: read only.
        positions: of the queries, int32 [batch, seq].
        documents: of the queries, numbered as those in the cache, int32 [batch, seq].
        relative_bias: as in `attention`.
        implementation: of the layer: with "dense" or "blockwise" nothing is left to a kernel.
    """
    return attend_cache(
        query,
        Cached(cache.key, cache.value, cache.value.shape[-1], cache.layer),
        Keys(positions, cache.slot_positions, documents, cache.slot_documents),
        window_len=cache.capacity,
        relative_bias=relative_bias,
        implementation=without_kernels(implementation),
    )
