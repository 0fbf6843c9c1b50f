"""Attention to tokens whose keys and values depend on their id alone.

    score(i, j) = q_i . k[id_j] + bias(i - j),    out_i = sum_j softmax_j v[id_j]

With c_v equal tokens of id v at one bias, their mass is exp(q_i . k[v] + log c_v): a vocabulary is
attended to instead of a sequence. Transformer-VQ (`ops/vq`) is the same with codes in place of ids;
here nothing is rounded.
"""

import jax
import jax.numpy as jnp

from longctx_jax.ops.attention import Keys, Partial, is_visible
from longctx_jax.ops.position import DistanceBias, distance_bias
from longctx_jax.typing import Array, Float, Int


def attend_counts(
    query: Float[Array, "batch seq heads key"],
    key_table: Float[Array, "vocab kv_heads key"],
    value_table: Float[Array, "vocab kv_heads value"],
    counts: Float[Array, "batch count_heads vocab"],
    offset: Float[Array, "batch offset_heads seq"] | None = None,
    *,
    scale: float,
) -> Partial:
    """Returns attention to every token that was counted, with its log-normaliser.

    Args:
        query: a multiple of the tables' heads.
        key_table: by id.
        value_table: by id.
        counts: how much each id weighs, >= 0, for all heads or each.
        offset: nats added to all scores of a query, -inf = it sees nothing; None = 0.
        scale: of the scores.

    Cost: 2 batch seq heads vocab (key + value) flops.
    """
    batch, seq, n_heads, _ = query.shape
    scores = _table_scores(query, key_table, scale)  # [batch, heads, seq, vocab]
    # The logarithm of 0 has no gradient, so it is taken of 1 and replaced.
    is_there = counts > 0
    log_counts = jnp.where(is_there, jnp.log(jnp.where(is_there, counts, 1.0)), -jnp.inf)
    scores = scores + log_counts[:, :, None].astype(scores.dtype)
    if offset is not None:
        scores = scores + offset[..., None].astype(scores.dtype)
    weights, largest, total = _exponentials(scores)
    return _mix(weights, largest, total, value_table, (batch, seq, n_heads), query.dtype)


def attend_ids(
    query: Float[Array, "batch seq heads key"],
    key_table: Float[Array, "vocab kv_heads key"],
    value_table: Float[Array, "vocab kv_heads value"],
    ids: Int[Array, "batch keys"],
    where: Keys,
    *,
    relative_bias: DistanceBias | None,
    scale: float,
) -> Partial:
    """Returns attention to a sequence of ids: scores are looked up, masses are summed by id.

    Args:
        query: a multiple of the tables' heads.
        key_table: by id.
        value_table: by id.
        ids: of the keys.
        where: positions (and documents) of queries and keys.
        relative_bias: added to the scores by distance.
        scale: of the scores.

    Cost: 2 batch seq heads vocab (key + value) flops, and a look-up and an addition a key and head.
    """
    batch, seq, n_heads, _ = query.shape
    vocab = key_table.shape[0]
    table = _table_scores(query, key_table, scale)
    scores = jnp.take_along_axis(table, ids[:, None, None], axis=-1)  # [batch, heads, seq, keys]
    if relative_bias is not None:
        distance = where.query_positions[:, :, None] - where.key_positions[:, None, :]
        scores = scores + jnp.moveaxis(distance_bias(relative_bias, distance), 0, 1)
    scores = jnp.where(is_visible(where, 0)[:, None], scores, -jnp.inf)
    weights, largest, total = _exponentials(scores)
    sizes = jnp.arange(batch), jnp.arange(n_heads), jnp.arange(seq), jnp.arange(1)
    place = (*jnp.ix_(*sizes)[:3], ids[:, None, None])
    by_id = jnp.zeros((batch, n_heads, seq, vocab), weights.dtype).at[place].add(weights)
    return _mix(by_id, largest, total, value_table, (batch, seq, n_heads), query.dtype)


def _table_scores(query, key_table, scale):
    batch, seq, n_heads, d_key = query.shape
    grouped = query.reshape(batch, seq, key_table.shape[1], -1, d_key)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("btgrk,vgk->bgrtv", grouped, key_table, preferred_element_type=wide)
    return scale * scores.reshape(batch, n_heads, seq, -1)


def _exponentials(scores):
    largest = jnp.max(scores, axis=-1)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    weights = jnp.exp(scores - largest[..., None])
    return weights, largest, jnp.sum(weights, axis=-1)


def _mix(weights, largest, total, value_table, sizes, dtype) -> Partial:
    """Mixes the value table by weights [batch, heads, seq, vocab]; divides by their total."""
    batch, seq, n_heads = sizes
    n_kv_heads, d_value = value_table.shape[1:]
    safe_total = jnp.where(total > 0, total, 1.0)
    weights = (weights / safe_total[..., None]).reshape(batch, n_kv_heads, -1, *weights.shape[2:])
    out = jnp.einsum(
        "bgrtv,vgd->btgrd",
        weights.astype(value_table.dtype),
        value_table,
        preferred_element_type=weights.dtype,
    )
    log_normalizer = jnp.where(total > 0, largest + jnp.log(safe_total), -jnp.inf)
    out = out.reshape(batch, seq, n_heads, d_value).astype(dtype)
    return Partial(out, jnp.moveaxis(log_normalizer, 1, 2))
