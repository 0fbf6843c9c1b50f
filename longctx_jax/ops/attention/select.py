"""Exact causal softmax attention: the front door, and which form it takes."""

import dataclasses

import jax
import jax.numpy as jnp

from longctx_jax.ops.attention import forms
from longctx_jax.ops.attention.partial import Keys, Partial, is_visible
from longctx_jax.ops.checked import checked
from longctx_jax.ops.dispatch import Implementation, choose, platform
from longctx_jax.ops.position import DistanceBias
from longctx_jax.ops.quarantine import Poison, is_bad
from longctx_jax.typing import Array, Float, Int

# Up to so many keys the dense form holds no more than 1.2 times what the blockwise one holds, whose
# last block is filled up. Beyond, it holds more and is not faster (2 CPU cores, float32, forward
# and backward, ms dense / blockwise, at batch x heads x tokens: 8x8x512 300/366, 8x4x640 179/365,
# 1x4x1024 84/78, 4x4x1024 371/357, 1x8x2048 1,538/673, 4x8x2048 9,585/8,078 in 2.2 / 0.6 GB).
DENSE_MAX_KEYS = 704


@dataclasses.dataclass(frozen=True)
class _Facts:
    platform: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    query_len: int
    key_len: int
    d_key: int
    d_value: int
    window_len: int
    is_aligned: bool
    has_segments: bool
    has_bias: bool
    needs_normalizer: bool


@checked
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
        segment_ids: document of each token; tokens see their own document only, and no NaN of
            another one.
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


@checked
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
        batch=query.shape[0],
        heads=n_heads,
        kv_heads=n_kv_heads,
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
    if not (is_aligned and where.query_segment_ids is not None):
        return chosen.run(query, key, value, where, window_len, relative_bias, scale)
    bad_query, bad_key = is_bad(query), is_bad(key) | is_bad(value)
    reached = _reached(bad_query, bad_key, where, window_len)
    none = jnp.zeros(query.shape[:1], bool)
    of_query, of_key = (Poison(bad, none, reached) for bad in (bad_query, bad_key))
    clean = (of_query.clean(query), of_key.clean(key), of_key.clean(value))
    partial = chosen.run(*clean, where, window_len, relative_bias, scale)
    return Partial(of_query.spread(partial.out), of_query.spread(partial.log_normalizer))


def _reached(bad_query, bad_key, where: Keys, window_len: int):
    """Returns which queries see a token that is not finite, [batch, seq]."""
    shape = bad_query.shape

    def look(_):
        visible = is_visible(where, window_len)
        return bad_query | jnp.any(visible & bad_key[:, None, :], axis=-1)

    return jax.lax.cond(
        jnp.any(bad_query) | jnp.any(bad_key), look, lambda _: jnp.zeros(shape, bool), None
    )


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
    tile = max(facts.window_len, forms.MIN_BAND_LEN)
    return "" if facts.query_len > 2 * tile else "the sequence is within two tiles"


def prefers_dense(query_len: int, key_len: int, heads: int, kv_heads: int, widths: int) -> bool:
    """Returns whether all scores at once are no burden beside the form that takes blocks of keys.

    Either there are few keys, or so few queries that their scores are fewer numbers than the copy
    of keys and values that the blockwise form makes. The batch multiplies both sides alike.

    Args:
        query_len: queries a row.
        key_len: keys a row.
        heads: of the queries.
        kv_heads: of keys and values.
        widths: of a key and a value, added.
    """
    return key_len <= DENSE_MAX_KEYS or query_len * heads <= kv_heads * widths


def _dense_unattractive(facts: _Facts) -> str:
    widths = facts.d_key + facts.d_value
    sizes = (facts.query_len, facts.key_len, facts.heads, facts.kv_heads, widths)
    if prefers_dense(*sizes):
        return ""
    n_scores = facts.batch * facts.heads * facts.query_len * facts.key_len
    return f"{n_scores} scores at once"


IMPLEMENTATIONS = (
    Implementation("cudnn", forms.cudnn, _cudnn_unsupported),
    Implementation("banded", forms.banded, _banded_unsupported, _banded_unattractive),
    Implementation("dense", forms.dense, unattractive=_dense_unattractive),
    Implementation("blockwise", forms.blockwise),
)
