"""Exact causal softmax attention: dense, banded, blockwise, cuDNN, and merging partial results.

Visibility is decided by positions and documents alone: query position i sees key position j iff

    0 <= j <= i,   i - j < window_len (if given),   segment_id(i) == segment_id(j).

A key position of -1 is an empty slot, so a ring buffer, a padded block and a fresh cache need no
other mask. Every form returns a `Partial` (output, log of the normaliser), so results over disjoint
key sets combine exactly. Query heads may be a multiple of key/value heads (GQA; MQA has one of
them): query head h reads key head h // (query heads / key heads).

Not here: rotating queries and keys (`position.py`), caches (`nn/kv_cache.py`).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.dispatch import Implementation, choose, platform
from longctx_jax.ops.position import DistanceBias, distance_bias
from longctx_jax.typing import Array, Float, Int

KEY_BLOCK_LEN = 512  # keys a step of the blockwise form
MIN_BAND_LEN = 64  # tokens a tile of the banded form, at least
DENSE_MAX_SCORES = 2**22  # query_len * key_len above which "auto" leaves the dense form
NEVER = -1  # position of an empty key slot


class Partial(NamedTuple):
    """Attention over some of the keys: divided by its own normaliser, whose log is kept."""

    out: jax.Array  # [batch, seq, heads, value]
    log_normalizer: jax.Array  # [batch, seq, heads], nats; -inf where no key was visible


class Keys(NamedTuple):
    """Where queries and keys stand in their stream. Leading axes broadcast over the batch."""

    query_positions: jax.Array  # int32 [batch or 1, seq]
    key_positions: jax.Array  # int32 [batch or 1, keys]; NEVER = empty slot
    query_segment_ids: jax.Array | None = None  # int32, as query_positions
    key_segment_ids: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class _Facts:
    platform: str
    dtype: str
    query_len: int
    key_len: int
    d_key: int
    d_value: int
    window_len: int
    is_aligned: bool
    has_segments: bool
    has_bias: bool
    needs_normalizer: bool


def attention(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch keys kv_heads key"],
    value: Float[Array, "batch keys kv_heads value"],
    *,
    segment_ids: Int[Array, "#batch seq"] | None = None,
    window_len: int = 0,
    relative_bias: DistanceBias | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch seq heads value"]:
    """Returns causal self-attention over one sequence, in the dtype of value.

    Args:
        query: of the tokens, [batch, seq, heads, key].
        key: of the same tokens (keys = seq).
        value: of the same tokens.
        segment_ids: document of each token; tokens see their own document only.
        window_len: keys a query sees, its own included; 0 = all.
        relative_bias: added to the scores by distance.
        scale: of the scores; None = 1/sqrt(key width).
        implementation: "auto", "dense", "banded" (needs a window), "blockwise", "cudnn".

    Raises:
        ValueError: if heads is not a multiple of kv_heads, or the implementation is unknown.
        NotImplementedError: if the named implementation cannot run here.

    Cost: 2 batch heads seq^2 (key + value) flops dense, 4 window_len / seq of that banded.
        Memory beyond the inputs: dense seq^2 a head, others linear in seq.
    """
    positions = jnp.arange(query.shape[1], dtype=jnp.int32)[None]
    where = Keys(positions, positions, segment_ids, segment_ids)
    return attention_partial(
        query,
        key,
        value,
        where,
        is_aligned=True,
        needs_normalizer=False,
        window_len=window_len,
        relative_bias=relative_bias,
        scale=scale,
        implementation=implementation,
    ).out


def attention_partial(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch keys kv_heads key"],
    value: Float[Array, "batch keys kv_heads value"],
    where: Keys,
    *,
    is_aligned: bool = False,
    needs_normalizer: bool = True,
    window_len: int = 0,
    relative_bias: DistanceBias | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Partial:
    """Returns attention of the queries over these keys, with its log-normaliser.

    Args:
        query: [batch, seq, heads, key].
        key: [batch, keys, kv_heads, key].
        value: [batch, keys, kv_heads, value].
        where: positions and documents of queries and keys.
        is_aligned: promise that key slot s is the token of query row s (self-attention over
            consecutive positions), which the banded and cuDNN forms need.
        needs_normalizer: whether the log-normaliser is used and differentiated; cuDNN's backward
            pass ignores its gradient, so that form is then ruled out.
        window_len: as in `attention`, like the options below.
        relative_bias: added to the scores.
        scale: of the scores.
        implementation: "auto" or a name.
    """
    n_heads, n_kv_heads = query.shape[2], key.shape[2]
    if n_heads % n_kv_heads:
        raise ValueError(
            f"query heads must be a multiple of key/value heads: got {n_heads} and {n_kv_heads}; "
            "set config.model.n_kv_heads to a divisor of config.model.n_heads"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    facts = _Facts(
        platform=platform(),
        dtype=str(query.dtype),
        query_len=query.shape[1],
        key_len=key.shape[1],
        d_key=key.shape[-1],
        d_value=value.shape[-1],
        window_len=window_len,
        is_aligned=is_aligned,
        has_segments=where.query_segment_ids is not None,
        has_bias=relative_bias is not None,
        needs_normalizer=needs_normalizer,
    )
    chosen = choose("attention", IMPLEMENTATIONS, implementation, facts)
    return chosen.run(query, key, value, where, window_len, relative_bias, scale)


def merge_partial_attention(left: Partial, right: Partial) -> Partial:
    """Combines two attention results computed over disjoint key sets.

    Associative, so any reduction order gives the same answer up to rounding. A row with no keys
    (log-normaliser -inf) is neutral; two of them give output 0 and log-normaliser -inf.

    Raises:
        ValueError: if the leading shapes differ.

    Cost: O(batch seq heads value); no matrix product.
    Source: Milakov & Gimelshein (2018), online normaliser for softmax.
    """
    if left.out.shape != right.out.shape:
        raise ValueError(
            f"partial results must have equal shapes: got {left.out.shape} and {right.out.shape}"
        )
    largest = jnp.maximum(left.log_normalizer, right.log_normalizer)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    left_mass = jnp.exp(left.log_normalizer - largest)
    right_mass = jnp.exp(right.log_normalizer - largest)
    mass = left_mass + right_mass
    safe_mass = jnp.where(mass > 0, mass, 1.0)
    out = (
        left.out * (left_mass / safe_mass)[..., None]
        + right.out * (right_mass / safe_mass)[..., None]
    )
    log_normalizer = jnp.where(mass > 0, largest + jnp.log(safe_mass), -jnp.inf)
    return Partial(out.astype(left.out.dtype), log_normalizer)


def attention_to_self(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq kv_heads key"],
    value: Float[Array, "batch seq kv_heads value"],
    *,
    relative_bias: DistanceBias | None = None,
    scale: float | None = None,
) -> Partial:
    """Returns each token's attention to itself alone: a softmax over one key.

    To be merged with what came before; arguments as of `attention_partial`. No matrix product.
    """
    group = query.shape[2] // key.shape[2]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    wide = _accumulator(query)
    scores = factor * jnp.sum(query.astype(wide) * key.astype(wide), axis=-1)
    if relative_bias is not None:
        scores += distance_bias(relative_bias, jnp.zeros((), jnp.int32))
    return Partial(value, scores)


def empty_partial(like: Partial) -> Partial:
    """Returns the neutral element of `merge_partial_attention`."""
    return Partial(jnp.zeros_like(like.out), jnp.full_like(like.log_normalizer, -jnp.inf))


def is_visible(where: Keys, window_len: int) -> jax.Array:
    """Returns the visibility rule of this file as bool [batch or 1, seq, keys]."""
    distance = where.query_positions[:, :, None] - where.key_positions[:, None, :]
    visible = (distance >= 0) & (where.key_positions >= 0)[:, None, :]
    if window_len:
        visible &= distance < window_len
    if where.query_segment_ids is not None and where.key_segment_ids is not None:
        visible &= where.query_segment_ids[:, :, None] == where.key_segment_ids[:, None, :]
    return visible


def _scores(query, key, where, window_len, relative_bias, scale):
    """Masked scores [batch, kv_heads, group, seq, keys], float32 (float64 for float64 inputs)."""
    batch, seq, n_heads, d_key = query.shape
    n_kv_heads = key.shape[2]
    grouped = query.reshape(batch, seq, n_kv_heads, n_heads // n_kv_heads, d_key)
    scores = scale * jnp.einsum(
        "btgrk,bsgk->bgrts", grouped, key, preferred_element_type=_accumulator(query)
    )
    if relative_bias is not None:
        distance = where.query_positions[:, :, None] - where.key_positions[:, None, :]
        bias = distance_bias(relative_bias, distance)
        bias = jnp.moveaxis(bias, 0, 1)  # [batch or 1, heads, seq, keys]
        scores += bias.reshape(bias.shape[0], n_kv_heads, -1, *bias.shape[2:])
    visible = is_visible(where, window_len)
    return jnp.where(visible[:, None, None], scores, -jnp.inf)


def _accumulator(x: jax.Array):
    return jnp.promote_types(x.dtype, jnp.float32)


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
        preferred_element_type=_accumulator(value),
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


def _dense(query, key, value, where, window_len, relative_bias, scale) -> Partial:
    """The definition: all scores at once. The reference for every other form."""
    scores = _scores(query, key, where, window_len, relative_bias, scale)
    return _finish(*_weigh(scores, value), value.dtype)


def _blockwise(query, key, value, where, window_len, relative_bias, scale) -> Partial:
    """Online softmax over blocks of keys; the backward pass recomputes each block's scores."""
    where, key, value = _split_keys(where, key, value, min(KEY_BLOCK_LEN, key.shape[1]))
    batch, seq, n_heads, _ = query.shape
    rows = (batch, key.shape[3], n_heads // key.shape[3], seq)
    dtype = _accumulator(query)
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


def _banded(query, key, value, where, window_len, relative_bias, scale) -> Partial:
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
    partial = _dense(
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


def _cudnn(query, key, value, where, window_len, relative_bias, scale) -> Partial:
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


def _cudnn_unsupported(facts: _Facts) -> str:
    if facts.platform != "gpu":
        return f"it needs a GPU, this is {facts.platform}"
    if facts.dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 or float16, got {facts.dtype}"
    if facts.needs_normalizer:
        return "its backward pass ignores the gradient of the normaliser that merging needs"
    if not facts.is_aligned or facts.has_segments or facts.has_bias:
        return "it takes one sequence without documents, cached keys or relative bias"
    if facts.d_key != facts.d_value or facts.d_key % 8 or facts.d_key > 256:
        widths = f"{facts.d_key} and {facts.d_value}"
        return f"it takes equal widths, a multiple of 8 up to 256: got {widths}"
    return ""


def _banded_unsupported(facts: _Facts) -> str:
    if not facts.window_len:
        return "it needs window_len > 0"
    return "" if facts.is_aligned else "it takes self-attention over consecutive tokens"


def _banded_unattractive(facts: _Facts) -> str:
    tile = max(facts.window_len, MIN_BAND_LEN)
    return "" if facts.query_len > 2 * tile else "the sequence is within two tiles"


def _dense_unattractive(facts: _Facts) -> str:
    n_scores = facts.query_len * facts.key_len
    return "" if n_scores <= DENSE_MAX_SCORES else f"{n_scores} scores a head at once"


IMPLEMENTATIONS = (
    Implementation("cudnn", _cudnn, _cudnn_unsupported),
    Implementation("banded", _banded, _banded_unsupported, _banded_unattractive),
    Implementation("dense", _dense, unattractive=_dense_unattractive),
    Implementation("blockwise", _blockwise),
)
