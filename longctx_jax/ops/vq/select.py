"""The front door of vector-quantised attention: checks arguments, chooses implementations."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.checked import checked
from longctx_jax.ops.dispatch import (
    Implementation,
    capability,
    choose,
    leaf,
    leaf_unsupported,
    platform,
)
from longctx_jax.ops.partition import by_rows
from longctx_jax.ops.products import accumulator
from longctx_jax.ops.quarantine import Poison, find_poison, is_bad
from longctx_jax.ops.vq import linear
from longctx_jax.ops.vq.blocks import Rules, attend_blocks
from longctx_jax.ops.vq.checks import require_codebook, require_documents, require_shapes
from longctx_jax.ops.vq.codebook import quantize, search_codes
from longctx_jax.ops.vq.state import Tokens, VQState, as_tokens, init_vq_state
from longctx_jax.ops.vq.step import step
from longctx_jax.ops.vq.table import REDUCTIONS, tables_before_blocks
from longctx_jax.typing import Array, Float, Int

LONGEST_BLOCK = {"cpu": 256}  # queries a block where the caller leaves it open, by platform
LONGEST_BLOCK_ELSEWHERE = 512
SHORTEST_BLOCK = 64


class VQOutput(NamedTuple):
    """What `vq_attention` returns."""

    out: jax.Array  # [batch, seq, heads, value], dtype of value
    state: VQState  # after the last token
    codes: jax.Array  # int32 [batch, seq, kv_heads], of the keys
    squared_error: jax.Array  # float32 [batch, seq, kv_heads], of quantising; moves the keys


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the choice of an implementation may depend on: static facts of one call."""

    platform: str
    capability: str
    dtype: str
    batch: int
    seq: int
    heads: int
    kv_heads: int
    d_key: int
    d_value: int
    n_codes: int
    window_len: int
    block_len: int
    has_bias: bool
    use_table: bool
    grad_through_cache: bool


KERNELS = "vq.pallas_triton"
ON_GPU = {"pallas_triton"}  # forms that XLA cannot cut
SUM_TABLES = {  # reduction -> what sums the tables before blocks
    name: functools.partial(tables_before_blocks, reduction=name) for name in REDUCTIONS
} | {"pallas_triton": leaf(KERNELS, "tables_before_blocks")}
ATTENTION = (
    Implementation(
        "pallas_triton",
        leaf(KERNELS, "attend_blocks"),
        unsupported=leaf_unsupported(KERNELS, "attention_unsupported"),
    ),
    Implementation("linear", attend_blocks),
    Implementation(
        "quadratic", attend_blocks, unattractive=lambda facts: "the linear form does less"
    ),
)


@dataclasses.dataclass(frozen=True)
class SearchFacts:
    """Static facts of one search for codes."""

    platform: str
    capability: str
    dtype: str
    n_vectors: int
    heads: int
    d_key: int
    n_codes: int


SEARCHES = (
    Implementation(
        "pallas_triton",
        leaf(KERNELS, "search_codes"),
        unsupported=leaf_unsupported(KERNELS, "search_unsupported"),
    ),
    Implementation("xla", search_codes),
)


@checked
def nearest_code(
    vectors: Float[Array, "*batch heads key"],
    codebook: Float[Array, "code_heads codes code_key"],
    *,
    implementation: str = "auto",
) -> tuple[Int[Array, "*batch heads"], Float[Array, "*batch heads"]]:
    """Returns the nearest codeword of each vector, and the squared distance to it.

    Args:
        vectors: one of each head's vectors a row.
        codebook: codewords of each head.
        implementation: "auto", "xla", or "pallas_triton" (a GPU kernel that never stores the
            distances).

    Returns:
        codes int32, the lowest index among equally near ones, and squared_error float32, whose
        gradient moves the vectors only.

    Raises:
        ValueError: shapes that contradict each other, or an unknown implementation.
        NotImplementedError: if the named implementation cannot run, with the reason.

    Cost: 2 vectors heads codes key flops.
    """
    require_codebook(vectors.shape[-2:], codebook.shape)
    facts = SearchFacts(
        platform=platform(),
        capability=capability(),
        dtype=str(vectors.dtype),
        n_vectors=math.prod(vectors.shape[:-2]),
        heads=vectors.shape[-2],
        d_key=vectors.shape[-1],
        n_codes=codebook.shape[1],
    )
    chosen = choose("nearest_code", SEARCHES, implementation, facts)
    # Distances do not change with the origin, and their rounding does: |C|^2 - 2 x C of vectors and
    # codewords that all lie far from 0 has lost what tells the codewords apart.
    origin = jnp.mean(codebook.astype(accumulator(vectors, codebook)), axis=1)
    fixed = (vectors - _like(origin, vectors)).astype(vectors.dtype), (codebook - origin[:, None])
    fixed = jax.lax.stop_gradient((fixed[0], fixed[1].astype(codebook.dtype)))
    if chosen.name in ON_GPU and vectors.ndim > 2:
        codes = by_rows(chosen.run, *fixed)
    else:
        codes = chosen.run(*fixed)
    return codes, quantize(vectors, codebook, codes).squared_error


@checked
def vq_attention(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch key_seq kv_heads key"],
    value: Float[Array, "batch value_seq value_heads value"],
    codebook: Float[Array, "code_heads codes code_key"],
    state: VQState | None = None,
    *,
    codes: Int[Array, "batch code_seq code_heads"] | None = None,
    relative_bias: Float[Array, "batch bias_seq bias_heads distances"] | None = None,
    documents: Int[Array, "batch document_seq"] | None = None,
    window_len: int = 0,
    block_len: int = 0,
    scale: float | None = None,
    reduction: str = "auto",
    use_table: bool = True,
    grad_through_cache: bool = True,
    implementation: str = "auto",
    search: str = "auto",
) -> VQOutput:
    """Returns causal softmax attention over vector-quantised keys, and the state after it.

    Every key is replaced by its nearest codeword, with a straight-through gradient from the queries
    at most window_len tokens later. The value is exact for the quantised keys at any split into
    calls and any block length.

    Args:
        query: a multiple of the key's heads: query head h reads kv head h // (heads / kv_heads).
        key: of the same tokens, before quantisation. Codewords and keys should lie at one scale.
        value: its width may differ.
        codebook: codewords; constant here.
        state: what came before (`init_vq_state`, or that of an earlier call); None = nothing.
        codes: of the keys, int32 [batch, seq, kv_heads], where they are known; None = searched.
        relative_bias: added to the scores of distances 0, 1, ..., window_len at most, by query.
        documents: which document each token belongs to, int32, >= 0 and not decreasing along the
            stream (state included); tokens see their own only. None = all continue the last one.
        window_len: tokens before a query that the bias and the straight-through gradient reach; the
            state keeps that many. 0 = the state's, or 512.
        block_len: queries a block: speed and memory, never the result. 0 = chosen.
        scale: of query . key; None = 1/sqrt(key width).
        reduction: how the tables before the blocks are summed: "serial", "matmul", "associative",
            "pallas_triton" (a GPU kernel), or "auto": the kernel with the attention kernel, else
            serial.
        use_table: see tokens beyond the window. Off, attention is a sliding window of window_len
            tokens before the query.
        grad_through_cache: values beyond the window get gradients.
        implementation: "auto", "linear" (plain JAX), "quadratic" (the same in one block: seq^2
            scores) or "pallas_triton" (a GPU kernel).
        search: of the codes: see `nearest_code`.

    Raises:
        ValueError: shapes or lengths that contradict each other, or unknown names.
        NotImplementedError: if a named implementation cannot run, with the reason.

    Cost: 2 batch heads seq (codes + window_len + block_len) (key + value) flops.
    Source: Lingle (2023), arXiv 2309.16354.
    """
    batch, seq, heads, d_key = query.shape
    window_len = window_len or (512 if state is None else state.window_len)
    require_shapes(query, key, value, codebook, state, codes, relative_bias, window_len)
    require_documents(documents, (batch, seq))
    if reduction not in ("auto", *SUM_TABLES):
        raise ValueError(
            f"vq_attention: reduction must be one of {['auto', *SUM_TABLES]}: got {reduction!r}; "
            "set config.model.vq.reduction"
        )
    codebook = jax.lax.stop_gradient(codebook)
    if block_len < 0:
        raise ValueError(
            f"vq_attention: block_len must not be negative: got {block_len}; 0 is chosen; set "
            "config.model.vq.block_len"
        )
    block_len = block_len or choose_block_len(window_len)
    poison = None
    if documents is not None:
        poison = _poison(query, key, value, documents, state)
        query, key, value = (poison.clean(x) for x in (query, key, value))
    if codes is None:
        codes, _ = nearest_code(key, codebook, implementation=search)
    quantized = quantize(key, codebook, codes)
    is_fresh = state is None
    if state is None:
        shape = (batch, window_len, key.shape[2], d_key, value.shape[-1], codebook.shape[1])
        state = init_vq_state(*shape, dtype=value.dtype)
    if documents is None:
        newest = jnp.maximum(jnp.max(state.documents, axis=1), 0)
        documents = jnp.broadcast_to(newest[:, None], (batch, seq))
    tokens = as_tokens(quantized.vectors, value, codes, documents)
    factor = 1 / math.sqrt(d_key) if scale is None else scale
    rules = Rules(window_len, factor, use_table, grad_through_cache)
    if seq == 1 and implementation == "auto":
        options = {"relative_bias": relative_bias, "rules": rules}
        out, state = step(query, tokens, codebook, state, **options)
        out = out if poison is None else poison.spread(out)
        return VQOutput(out, state, codes, quantized.squared_error)

    facts = Facts(
        platform=platform(),
        capability=capability(),
        dtype=str(jnp.result_type(query, value)),
        batch=batch,
        seq=seq,
        heads=heads,
        kv_heads=key.shape[2],
        d_key=d_key,
        d_value=value.shape[-1],
        n_codes=codebook.shape[1],
        window_len=window_len,
        block_len=min(block_len, seq),
        has_bias=relative_bias is not None,
        use_table=use_table,
        grad_through_cache=grad_through_cache,
    )
    chosen = choose("vq_attention", ATTENTION, implementation, facts)
    if reduction == "auto":
        reduction = "pallas_triton" if chosen.name == "pallas_triton" else "serial"
    elif reduction == "pallas_triton" and (
        reason := leaf_unsupported(KERNELS, "tables_unsupported")(facts)
    ):
        raise NotImplementedError(
            f"vq_attention: reduction 'pallas_triton' cannot run here: {reason}; choose another "
            "one or 'auto'"
        )

    def attend(rows, codebook):
        query, tokens, state, relative_bias = rows
        return linear.attend(
            query,
            Tokens(**tokens),
            codebook,
            state,
            is_fresh=is_fresh,
            relative_bias=relative_bias,
            rules=rules,
            block_len=seq if chosen.name == "quadratic" else block_len,
            sum_tables=SUM_TABLES[reduction],
            attend_blocks=chosen.run,
        )

    rows = (query, vars(tokens), state, relative_bias)
    if {chosen.name, reduction} & ON_GPU:
        out, after = by_rows(attend, rows, codebook)
    else:
        out, after = attend(rows, codebook)
    out = out if poison is None else poison.spread(out)
    return VQOutput(out, after, codes, quantized.squared_error)


def _like(per_head: Array, vectors: Array) -> Array:
    """Returns [heads, key] with the leading axes of the vectors."""
    return per_head.reshape(*[1] * (vectors.ndim - 2), *per_head.shape)


def _poison(query, key, value, documents, state: VQState | None) -> Poison:
    """Returns what tokens of this call that are not finite reach; they do not enter the state."""
    before = documents[:, :1]
    if state is not None:
        newest = jnp.max(state.documents, axis=1, keepdims=True)
        before = jnp.where(newest < 0, before, newest)
    previous = jnp.concatenate([before, documents[:, :-1]], axis=1)
    bad = is_bad(query) | is_bad(key) | is_bad(value)
    return find_poison(bad, documents != previous)


def choose_block_len(window_len: int) -> int:
    """Returns the block length where the caller leaves it open.

    The window is rounded up to blocks, so a block longer than the window wastes scores; one much
    shorter wastes tables.
    """
    longest = LONGEST_BLOCK.get(platform(), LONGEST_BLOCK_ELSEWHERE)
    return min(longest, max(SHORTEST_BLOCK, window_len))
