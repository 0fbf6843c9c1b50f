"""What the cost formulas of mixers share: visible keys, scores that exist at once, projections.

Matrix products only, a multiply and an add each count. Recomputation (remat, blockwise attention)
is not model work and not counted.
"""

from longctx_jax.nn.contract import Call, Sizes
from longctx_jax.ops.attention import KEY_BLOCK_LEN, prefers_dense

SCORE_COPIES = 2  # of scores, float32: before and after the exponential


def projection_flops(sizes: Sizes) -> int:
    """Returns 2 d (H K + H_kv (K + V) + H V): queries, keys, values and the way back."""
    return 2 * sizes.d_model * head_numbers(sizes)


def head_numbers(sizes: Sizes) -> int:
    """Returns H K + H_kv (K + V) + H V: a token's queries, keys, values and outputs."""
    inputs = sizes.n_heads * sizes.d_key + sizes.n_kv_heads * (sizes.d_key + sizes.d_value)
    return inputs + sizes.n_heads * sizes.d_value


def softmax_flops(sizes: Sizes, n_keys: float) -> float:
    """Returns projections, and 2 H n_keys (K + V) for exact attention to so many keys."""
    pairs = 2 * sizes.n_heads * n_keys * (sizes.d_key + sizes.d_value)
    return projection_flops(sizes) + pairs


def n_keys(call: Call, window_len: int = 0) -> float:
    """Returns how many keys a query meets on average; window_len 0 = no window."""
    reach = min(filter(None, (window_len, call.cache_len)), default=0)
    if call.pairs == "dense":
        return float(call.seq_len + (reach or call.n_past if call.n_past else 0))
    return mean_visible_keys(call.seq_len, call.n_past, reach)


def mean_visible_keys(seq_len: int, n_past: int = 0, reach: int = 0) -> float:
    """Returns the mean over a call's queries of how many keys each sees, its own included.

    Query t sees n_past + t + 1 keys, at most `reach` (0 = no limit): (seq_len + 1) / 2 for a causal
    window on its own.
    """
    if not reach:
        return n_past + (seq_len + 1) / 2
    n_growing = min(seq_len, max(0, reach - n_past))  # queries that still see everything
    growing = n_growing * n_past + n_growing * (n_growing + 1) / 2
    return (growing + (seq_len - n_growing) * reach) / seq_len


def ring_scores(sizes: Sizes, seq_len: int, ring_len: int) -> int:
    """Returns scores of the tokens among themselves, or onto the ring, whichever are more."""
    own = 0 if seq_len == 1 else pairs_at_once(sizes, seq_len, seq_len)
    n_reaching = min(seq_len, max(1, ring_len - 1))
    return SCORE_COPIES * sizes.n_heads * max(own, pairs_at_once(sizes, n_reaching, ring_len))


def pairs_at_once(sizes: Sizes, n_queries: int, n_keys: int) -> int:
    """Returns the pairs whose scores exist at once: all, or those of a block of keys."""
    heads, kv_heads, widths = sizes.n_heads, sizes.n_kv_heads, sizes.d_key + sizes.d_value
    if prefers_dense(n_queries, n_keys, heads, kv_heads, widths):
        return n_queries * n_keys
    return n_queries * min(n_keys, KEY_BLOCK_LEN)


def chunked_scores(seq_len: int, chunk_len: int, state: int) -> int:
    """Returns a head's scores within chunks, with decays and without, and a state a chunk."""
    if seq_len == 1:
        return 0
    return SCORE_COPIES * seq_len * min(seq_len, chunk_len) + -(-seq_len // chunk_len) * state


def chunked_flops(n_heads: int, seq_len: int, chunk_len: int, d_key: int, d_value: int) -> int:
    """Returns 2 (c (K + V) + 2 K V) a head, c = min(chunk_len, seq_len), for all heads.

    Scores and values within a chunk, the square in full since no smaller number is usual, then the
    read and the update of the state. A short last chunk is not rounded up.
    """
    chunk = min(chunk_len, seq_len)
    return 2 * n_heads * (chunk * (d_key + d_value) + 2 * d_key * d_value)
