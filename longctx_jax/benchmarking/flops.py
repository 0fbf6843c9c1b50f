"""Model FLOPs by formula: what the mathematics needs, whatever the hardware does.

Matrix products only, a multiply and an add each count. Recomputation (remat, blockwise attention)
is not model work and not counted. Exact attention counts the (query, key) pairs that are visible:
the causal half, or the window. Forms that compute the masked pairs as well do up to twice that, so
they show a lower model FLOP/s; pairs="dense" counts those, as a dense form computes them. Decay
attention counts its chunked form, the square inside a chunk in full: no smaller number is usual.
Vector-quantised attention counts the window's keys one by one and everything older as codes; sums
of values by code are additions, and its sinusoids are projected once a call: neither is counted.
"""

import dataclasses

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import MIXERS

TRAIN_FACTOR = 3  # forward, and a backward pass of two products for each of the forward's


def forward_flops_per_token(
    config: ModelConfig,
    seq_len: int,
    *,
    n_past: int = 0,
    cache_len: int = 0,
    pairs: str = "visible",
) -> float:
    """Returns the mean forward FLOPs of a token over one call.

        sum over layers of (mixer + MLP), plus 2 d_model vocab

    Args:
        config: with its pattern filled in (`build_model(...).config`).
        seq_len: tokens of the call.
        n_past: tokens of the stream before the call that the caches have seen.
        cache_len: tokens full attention looks back on, its own included; 0 = all.
        pairs: "visible", or "dense": all seq_len own keys and the whole cache of every query.

    Raises:
        ValueError: if pairs is neither.
    """
    if pairs not in ("visible", "dense"):
        raise ValueError(f'pairs must be "visible" or "dense": got {pairs!r}; choose one of them')
    if config.recurrence != "none":
        return recurrence_flops(config, pairs=pairs) + 2 * config.d_model * config.vocab_size
    past = {"n_past": n_past, "cache_len": cache_len, "pairs": pairs}
    n_repeats = config.n_layers // len(config.pattern)
    total = config.n_layers * mlp_flops(config)
    if config.name == "stagformer":
        stag = config.stagformer
        n_upper = config.n_layers - config.n_layers // stag.n_stacks
        total += n_upper * cross_flops(config, seq_len, **past)
    for kind in config.pattern:
        if kind == "decay":
            layer = decay_flops(config, seq_len)
        elif kind == "vq":
            layer = vq_flops(config, seq_len, n_past=n_past, pairs=pairs)
        elif kind == "rwkv":
            layer = rwkv_flops(config, seq_len)
        elif kind == "mamba":
            layer = mamba_flops(config, seq_len)
        elif kind == "inattention":
            layer = inattention_flops(config, _n_keys(seq_len, 0, **past))
        else:
            window = config.sliding.window_len if kind == "sliding" else 0
            layer = softmax_flops(config, _n_keys(seq_len, window, **past))
        total += n_repeats * layer
    if config.name == "inattention":
        total += row_flops(config)
    return total + 2 * config.d_model * config.vocab_size


def train_flops_per_token(config: ModelConfig, seq_len: int, **past) -> float:
    """Returns 3 times `forward_flops_per_token`: one pass forward, twice its products backward."""
    return TRAIN_FACTOR * forward_flops_per_token(config, seq_len, **past)


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


def recurrence_flops(config: ModelConfig, *, pairs: str = "visible") -> float:
    """Returns the FLOPs a text token of a stack with memory between segments of T tokens.

    A segment has T + M rows ("rmt", "layerwise": T + 2M), each a row of a model of that length
    without memory. An ARMT layer adds, with K features, a query, and a read of 2 K d a row, and for
    each of M rows a key, a value and a gate, a read and a write.
    """
    memory, d = config.memory, config.d_model
    n_after = memory.n_memory_tokens
    n_rows = memory.segment_len + n_after * (1 if config.recurrence == "armt" else 2)
    pattern = tuple(memory.mixer if kind == "armt" else kind for kind in config.pattern)
    plain = dataclasses.replace(config, name="transformer", pattern=pattern, vocab_size=1)
    rows = n_rows * (forward_flops_per_token(plain, n_rows, pairs=pairs) - 2 * d)
    n_features = 2 * memory.nu * memory.d_memory // memory.n_heads
    recall = 2 * n_features * (d + memory.n_heads)
    read = n_rows * (2 * d * memory.d_memory + recall)
    write = n_after * (2 * d * (memory.d_memory + d + memory.n_heads) + 2 * recall)
    n_armt = config.pattern.count("armt") * config.n_layers // len(config.pattern)
    return (rows + n_armt * (read + write)) / memory.segment_len


def _n_keys(seq_len: int, window_len: int, *, n_past: int, cache_len: int, pairs: str) -> float:
    """Returns how many keys a query meets on average."""
    reach = min(filter(None, (window_len, cache_len)), default=0)
    if pairs == "dense":
        return float(seq_len + (reach or n_past if n_past else 0))
    return mean_visible_keys(seq_len, n_past, reach)


def cross_flops(config: ModelConfig, seq_len: int, **past) -> float:
    """Returns what a layer of an upper staggered stack adds: attention onto the one below.

    As a layer of self-attention; a window of 1 is one product, 2 d^2, and a sum at the input is
    none. Keys and values are counted once a token, as if kept: attention over the rows themselves
    (cross_cache "memory") does 2 H n (2 d - K - V) more for n rows.
    """
    stag = config.stagformer
    if stag.handoff == "add":
        return 0.0
    if stag.cross_window == 1:
        return 2.0 * config.d_model**2
    return softmax_flops(config, _n_keys(seq_len, stag.cross_window, **past))


def mlp_flops(config: ModelConfig) -> int:
    """Returns 2 d_model d_ff a matrix: three of them for swiglu, two for others, none for none."""
    if config.mlp == "rwkv":  # key, value, and a receptance of width d_model
        return 2 * config.d_model * (2 * config.d_ff + config.d_model)
    n_matrices = {"swiglu": 3, "none": 0}.get(config.mlp, 2)
    return 2 * config.d_model * config.d_ff * n_matrices


def softmax_flops(config: ModelConfig, n_keys: float) -> float:
    """Returns projections 2 d (H K + H_kv (K + V) + H V), and 2 H n_keys (K + V) for attention."""
    d, heads, d_key, d_value = config.d_model, config.n_heads, config.d_key, config.d_value
    inputs = heads * d_key + config.n_kv_heads * (d_key + d_value)
    projections = 2 * d * (inputs + heads * d_value)
    return projections + 2 * heads * n_keys * (d_key + d_value)


def inattention_flops(config: ModelConfig, n_keys: float) -> float:
    """Returns what a layer costs a token with the keys and values of all n_keys tokens at hand.

    As `softmax_flops` with keys and values of d_memory numbers; rotary numbers beside the content
    add 2 H r (d + n_keys). Decoding from rows, ids or counts does other work: docs/inattention.md.
    """
    c, d, heads = config.inattention, config.d_model, config.n_heads
    turned = c.d_rotary if c.score_position == "decoupled" else 0
    inputs = 2 * d * heads * (config.d_key + turned + config.d_value)
    inputs += 2 * (c.d_memory or d) * config.n_kv_heads * (config.d_key + config.d_value)
    return inputs + 2 * heads * n_keys * (config.d_key + turned + config.d_value)


def row_flops(config: ModelConfig) -> float:
    """Returns what a token's row of the initial memory costs: 2 d a number that is projected."""
    c = config.inattention
    turned = c.d_rotary if c.score_position == "decoupled" else 0
    narrow = c.d_memory if c.d_memory not in (0, config.d_model) else 0
    return 2 * config.d_model * (narrow + turned)


def decay_flops(config: ModelConfig, seq_len: int) -> float:
    """Returns projections 2 d (H K + H_kv (K + V) + H V) and 2 H (c (K + V) + 2 K V) for the op.

    A gate adds 2 d H V, a decay per token 2 d H.

    c = min(chunk_len, seq_len): scores and values within a chunk, then the read and the update of
    the state. A short last chunk is not rounded up.
    """
    heads, d_key, d_value = config.n_heads, config.d_key, config.d_value
    chunk = min(config.decay.chunk_len, seq_len)
    inputs = heads * d_key + config.n_kv_heads * (d_key + d_value)
    outputs = heads * d_value * (1 if config.decay.gate == "none" else 2)
    gates = heads if config.decay.kind == "gated" else 0
    projections = 2 * config.d_model * (inputs + outputs + gates)
    return projections + 2 * heads * (chunk * (d_key + d_value) + 2 * d_key * d_value)


def rwkv_flops(config: ModelConfig, seq_len: int) -> float:
    """Returns the products of the time mix: projections, and for version 6 its low ranks and op.

    Version 4: 8 d^2; its average has none. Version 6, with c = min(chunk, seq_len):

        2 d (2 H K + 2 H V) + 2 H V d + 20 d r_shift + 2 r_decay (d + H K) + 2 H (c (K + V) + 2 K V)
    """
    d, mixer = config.d_model, MIXERS["rwkv"](config)
    if mixer.version == 4:
        return 8 * d * d
    heads, d_key, d_value = mixer.n_heads, mixer.d_key, mixer.d_value
    chunk = min(mixer.chunk_len, seq_len)
    projections = 2 * d * (2 * heads * d_key + 3 * heads * d_value)
    low_ranks = 20 * d * mixer.shift_rank + 2 * mixer.decay_rank * (d + heads * d_key)
    return projections + low_ranks + 2 * heads * (chunk * (d_key + d_value) + 2 * d_key * d_value)


def mamba_flops(config: ModelConfig, seq_len: int) -> float:
    """Returns the products of Mamba: projections, and what reads (and writes) the state.

    With I = expand d channels and n numbers of state, version 1: 6 d I + 2 I (2 r + 2 n) + 2 I n.
    Version 2, with heads of P channels, G groups and c = min(chunk, seq_len):

        2 d (3 I + 2 G n + I/P) + 2 (I/P) (c (n + P) + 2 n P)
    """
    d, mixer = config.d_model, MIXERS["mamba"](config)
    inner, n, width = mixer.d_inner, mixer.d_state, mixer.head_len
    if mixer.version == 1:
        return 6 * d * inner + 4 * inner * (mixer.step_rank + n) + 2 * inner * n
    heads, chunk = inner // width, min(mixer.chunk_len, seq_len)
    projections = 2 * d * (3 * inner + 2 * mixer.n_groups * n + heads)
    return projections + 2 * heads * (chunk * (n + width) + 2 * n * width)


def vq_flops(
    config: ModelConfig, seq_len: int, *, n_past: int = 0, pairs: str = "visible"
) -> float:
    """Returns projections, position bias, search, and 2 H (codes + keys) (K + V) for attention.

        2 d (H K + H_kv (K + V) + H V) + 2 H (window + 1) K + 2 H_kv codes K

    A gate adds 2 d H V. Visible: a query sees the window's keys and its own, and the codes once a
    token left the window; dense: all codes, and all keys of its block and of those that the window
    reaches, as the linear form computes them (without a block length: one block).
    """
    heads, kv_heads, d_key, d_value = (
        config.n_heads,
        config.n_kv_heads,
        config.d_key,
        config.d_value,
    )
    vq = config.vq
    n_codes = float(vq.codebook_size if vq.use_table else 0)
    if pairs == "dense":
        block = min(vq.block_len or seq_len, seq_len)
        before = -(-vq.window_len // block) * block if block < seq_len else 0
        n_keys = float(before + block)
    else:
        n_keys = mean_visible_keys(seq_len, n_past, vq.window_len + 1)
        n_early = max(0, min(seq_len, vq.window_len + 1 - n_past))  # queries that see no code
        n_codes *= (seq_len - n_early) / seq_len
    outputs = heads * d_value * (1 if vq.gate == "none" else 2)
    projections = 2 * config.d_model * (heads * d_key + kv_heads * (d_key + d_value) + outputs)
    bias = 0 if vq.position == "none" else 2 * heads * (vq.window_len + 1) * d_key
    search = 2 * kv_heads * vq.codebook_size * d_key
    return projections + bias + search + 2 * heads * (n_codes + n_keys) * (d_key + d_value)
