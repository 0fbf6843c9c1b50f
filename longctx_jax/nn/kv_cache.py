"""The key/value cache of exact attention: a ring buffer of the last `capacity` tokens.

Slot p % capacity holds the token at stream position p; each slot records its position and document,
so the visibility rule of `ops/attention.py` is the only mask. One cache serves full attention
(capacity = the longest context wanted) and sliding windows (capacity = window). A stream longer
than the capacity keeps going: attention then sees the last `capacity` tokens, at any split.
"""

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
    empty_partial,
    merge_partial_attention,
)
from longctx_jax.ops.position import DistanceBias


@flax.struct.dataclass
class KVCache:
    """Keys and values of the last tokens of a stream, one row a batch entry."""

    key: jax.Array  # [batch, capacity, kv_heads, key]
    value: jax.Array  # [batch, capacity, kv_heads, value]
    slot_positions: jax.Array  # int32 [batch, capacity]; NEVER = empty
    slot_documents: jax.Array  # int32 [batch, capacity]
    position: jax.Array  # int32 [batch], of the next token


def init_kv_cache(
    batch_size: int, capacity: int, n_kv_heads: int, d_key: int, d_value: int, dtype: str
) -> KVCache:
    """Returns an empty cache of 2 capacity n_kv_heads (d_key + d_value) bytes a row in bfloat16."""
    return KVCache(
        key=jnp.zeros((batch_size, capacity, n_kv_heads, d_key), dtype),
        value=jnp.zeros((batch_size, capacity, n_kv_heads, d_value), dtype),
        slot_positions=jnp.full((batch_size, capacity), NEVER, jnp.int32),
        slot_documents=jnp.zeros((batch_size, capacity), jnp.int32),
        position=jnp.zeros((batch_size,), jnp.int32),
    )


def extend(cache: KVCache, key: jax.Array, value: jax.Array, documents: jax.Array) -> KVCache:
    """Returns the cache after appending tokens; of more than `capacity`, the last ones stay."""
    batch, seq = key.shape[:2]
    kept = min(seq, cache.key.shape[1])
    positions = cache.position[:, None] + jnp.arange(seq - kept, seq, dtype=jnp.int32)
    rows = jnp.arange(batch)[:, None]
    slots = positions % cache.key.shape[1]

    def write(buffer, new):
        new = new[:, seq - kept :].astype(buffer.dtype)
        return buffer.at[rows, slots].set(new, unique_indices=True)

    return KVCache(
        key=write(cache.key, key),
        value=write(cache.value, value),
        slot_positions=cache.slot_positions.at[rows, slots].set(positions, unique_indices=True),
        slot_documents=write(cache.slot_documents, documents),
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
) -> tuple[jax.Array, KVCache | None]:
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
        implementation: for the new tokens among themselves.

    Returns:
        out [batch, seq, heads, value], and the extended cache.
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
    seq, capacity = query.shape[1], cache.key.shape[1]
    extended = extend(cache, key, value, documents.index)
    if seq == 1:  # the ring holds the new token and every other it may see
        partial = attend_ring(
            query, extended, cache.position[:, None], documents.index, relative_bias
        )
        return partial.out, extended

    positions = cache.position[:, None] + jnp.arange(seq, dtype=jnp.int32)
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
        return own.out, extended
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
    return jnp.concatenate([out, own.out[:, n_reaching:]], axis=1), extended


def attend_ring(
    query: jax.Array,
    cache: KVCache,
    positions: jax.Array,
    documents: jax.Array,
    relative_bias: DistanceBias | None,
    scale: float | None = None,
) -> Partial:
    """Attends over what the ring holds.

    Args:
        query: [batch, seq, heads, key].
        cache: read only.
        positions: of the queries, int32 [batch, seq].
        documents: of the queries, numbered as those in the cache, int32 [batch, seq].
        relative_bias: as in `attention`.
        scale: of the scores; None = 1/sqrt(key width).
    """
    return attention_partial(
        query,
        cache.key.astype(query.dtype),
        cache.value.astype(query.dtype),
        Keys(positions, cache.slot_positions, documents, cache.slot_documents),
        window_len=cache.key.shape[1],
        relative_bias=relative_bias,
        scale=scale,
    )
