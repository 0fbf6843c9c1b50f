"""The forms of exact attention: dense (the definition), banded, blockwise, cuDNN.

All take (query, key, value, where, window_len, relative_bias, scale) and return a `Partial`. Query
heads may be a multiple of key/value heads (GQA; MQA has one of them): query head h reads key head
h // (query heads / key heads).
"""

import jax
import jax.numpy as jnp

from longctx_jax.ops.attention.partial import NEVER, Keys, Partial, is_visible
from longctx_jax.ops.position import distance_bias
from longctx_jax.ops.products import accumulator

KEY_BLOCK_LEN = 512  # keys a step of the blockwise form
MIN_BAND_LEN = 64  # tokens a tile of the banded form, at least


def _scores(query, key, where, window_len, relative_bias, scale):
    """Masked scores [batch, kv_heads, group, seq, keys], float32 (float64 for float64 inputs)."""
    batch, seq, n_heads, d_key = query.shape
    n_kv_heads = key.shape[2]
    grouped = query.reshape(batch, seq, n_kv_heads, n_heads // n_kv_heads, d_key)
    scores = scale * jnp.einsum(
        "btgrk,bsgk->bgrts", grouped, key, preferred_element_type=accumulator(query)
    )
    if relative_bias is not None:
        distance = where.query_positions[:, :, None] - where.key_positions[:, None, :]
        bias = distance_bias(relative_bias, distance)
        bias = jnp.moveaxis(bias, 0, 1)  # [batch or 1, heads, seq, keys]
        scores += bias.reshape(bias.shape[0], n_kv_heads, -1, *bias.shape[2:])
    visible = is_visible(where, window_len)
    return jnp.where(visible[:, None, None], scores, -jnp.inf)


def _weigh(scores: jax.Array, value: jax.Array):
    """Returns unnormalised output [b g r t v], row maximum and row sum [b g r t] of exp(scores)."""
    largest = jnp.max(scores, axis=-1)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    weights = jnp.exp(scores - largest[..., None])
    total = jnp.sum(weights, axis=-1)
    out = jnp.einsum(
        "bgrts,bsgv->bgrtv",
        weights.astype(value.dtype),
        value,
        preferred_element_type=accumulator(value),
    )
    return out, largest, total


def _finish(out, largest, total, dtype) -> Partial:
    """Divides by the normaliser and puts heads after time."""
    safe_total = jnp.where(total > 0, total, 1.0)
    out = out / safe_total[..., None]
    log_normalizer = jnp.where(total > 0, largest + jnp.log(safe_total), -jnp.inf)
    batch, n_kv_heads, group, seq, d_value = out.shape
    out = jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(batch, seq, n_kv_heads * group, d_value)
    log_normalizer = jnp.transpose(log_normalizer, (0, 3, 1, 2)).reshape(batch, seq, -1)
    return Partial(out.astype(dtype), log_normalizer)


def dense(query, key, value, where, window_len, relative_bias, scale) -> Partial:
    """The definition: all scores at once. The reference for every other form."""
    scores = _scores(query, key, where, window_len, relative_bias, scale)
    return _finish(*_weigh(scores, value), value.dtype)


def blockwise(query, key, value, where, window_len, relative_bias, scale) -> Partial:
    """Online softmax over blocks of keys; the backward pass recomputes each block's scores."""
    where, key, value = _split_keys(where, key, value, min(KEY_BLOCK_LEN, key.shape[1]))
    batch, seq, n_heads, _ = query.shape
    rows = (batch, key.shape[3], n_heads // key.shape[3], seq)
    dtype = accumulator(query)
    start = (
        jnp.zeros((*rows, value.shape[-1]), dtype),
        jnp.full(rows, -jnp.inf, dtype),
        jnp.zeros(rows, dtype),
    )

    @jax.checkpoint
    def add_block(carry, block):
        block_where, key, value = block
        out, largest, total = carry
        scores = _scores(query, key, block_where, window_len, relative_bias, scale)
        block_out, block_largest, block_total = _weigh(scores, value)
        block_largest = jnp.where(block_total > 0, block_largest, -jnp.inf)
        new_largest = jnp.maximum(largest, block_largest)
        safe = jnp.where(jnp.isfinite(new_largest), new_largest, 0.0)
        keep, take = jnp.exp(largest - safe), jnp.exp(block_largest - safe)
        out = out * keep[..., None] + block_out * take[..., None]
        return (out, new_largest, total * keep + block_total * take), None

    def broadcast_queries(block_keys):
        return Keys(where.query_positions, block_keys[0], where.query_segment_ids, block_keys[1])

    (out, largest, total), _ = jax.lax.scan(
        lambda c, b: add_block(c, (broadcast_queries(b[:2]), *b[2:])),
        start,
        (where.key_positions, where.key_segment_ids, key, value),
    )
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)
    return _finish(out, jax.lax.stop_gradient(largest), total, value.dtype)


def _split_keys(where: Keys, key, value, block_len: int):
    """Pads keys with empty slots to whole blocks and puts the block axis first."""
    n_blocks = -(-key.shape[1] // block_len)
    pad = n_blocks * block_len - key.shape[1]

    def split(x, fill=0):
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], n_blocks, block_len, *x.shape[2:]), 1, 0)

    segments = where.key_segment_ids
    where = where._replace(
        key_positions=split(where.key_positions, NEVER),
        key_segment_ids=None if segments is None else split(segments),
    )
    return where, split(key), split(value)


def banded(query, key, value, where, window_len, relative_bias, scale) -> Partial:
    """Tiles of queries, each against its own and the previous tile of keys: linear in seq."""
    tile = max(window_len, MIN_BAND_LEN)
    batch, seq = query.shape[:2]
    n_tiles = -(-seq // tile)

    def tiles(x, fill=0):  # [batch, seq, ...] -> [batch * n_tiles, tile, ...]
        x = jnp.broadcast_to(x, (batch, *x.shape[1:]))
        pad = [(0, 0), (0, n_tiles * tile - seq)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad, constant_values=fill)
        return x.reshape(batch, n_tiles, tile, *x.shape[2:])

    def fold(x):
        return x.reshape(batch * n_tiles, *x.shape[2:])

    def with_previous(x, fill=0):
        x = tiles(x, fill)
        first = jnp.full_like(x[:, :1], fill)
        return fold(jnp.concatenate([jnp.concatenate([first, x[:, :-1]], axis=1), x], axis=2))

    segments = where.query_segment_ids
    tile_where = Keys(
        fold(tiles(where.query_positions, NEVER)),
        with_previous(where.key_positions, NEVER),
        None if segments is None else fold(tiles(segments)),
        None if segments is None else with_previous(segments),
    )
    partial = dense(
        fold(tiles(query)),
        with_previous(key),
        with_previous(value),
        tile_where,
        window_len,
        relative_bias,
        scale,
    )

    def unfold(x):
        return x.reshape(batch, n_tiles * tile, *x.shape[2:])[:, :seq]

    return Partial(unfold(partial.out), unfold(partial.log_normalizer))


def cudnn(query, key, value, where, window_len, relative_bias, scale) -> Partial:
    """Fused attention of cuDNN through jax.nn, with its residual as the log-normaliser."""
    del where, relative_bias
    out, log_normalizer = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=True,
        local_window_size=(window_len - 1, 0) if window_len else None,
        implementation="cudnn",
        return_residual=True,
    )
    return Partial(out, log_normalizer)
