"""Model FLOPs by formula: what the mathematics needs, whatever the hardware does.

Matrix products only, a multiply and an add each count. Recomputation (remat, blockwise attention)
is not model work and not counted. Exact attention counts the (query, key) pairs that are visible:
the causal half, or the window. Forms that compute the masked pairs as well do up to twice that, so
they show a lower model FLOP/s; pairs="dense" counts those, as a dense form computes them. What a
mixer costs is its own file's to say (`Mixer.costs`); here are models.
"""

import dataclasses

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import sizes_of
from longctx_jax.nn import costs
from longctx_jax.nn.contract import Call

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
    call = Call(seq_len, n_past, cache_len, pairs)
    n_repeats = config.n_layers // len(config.pattern)
    total = config.n_layers * mlp_flops(config)
    if config.name == "stagformer":
        stag = config.stagformer
        n_upper = config.n_layers - config.n_layers // stag.n_stacks
        total += n_upper * cross_flops(config, call)
    if config.name == "inattention":
        total += config.n_layers * inattention_flops(config, costs.n_keys(call)) + row_flops(config)
    else:
        total += n_repeats * sum(mixer_flops(config, kind, call) for kind in config.pattern)
    return total + 2 * config.d_model * config.vocab_size


def mixer_flops(config: ModelConfig, kind: str, call: Call) -> float:
    """Returns the FLOPs of a token in one layer's mixer.

    Raises:
        ValueError: if the config has no such mixer.
    """
    if kind not in config.mixers:
        raise ValueError(
            f"a mixer must be one of {sorted(config.mixers)} to be counted: got {kind!r} in "
            f"config.model.pattern={config.pattern}; pass it to build_model(..., mixers=...)"
        )
    return config.mixers[kind].costs(sizes_of(config), config.of(kind), call).flops


def train_flops_per_token(config: ModelConfig, seq_len: int, **past) -> float:
    """Returns 3 times `forward_flops_per_token`: one pass forward, twice its products backward."""
    return TRAIN_FACTOR * forward_flops_per_token(config, seq_len, **past)


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


def cross_flops(config: ModelConfig, call: Call) -> float:
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
    return costs.softmax_flops(sizes_of(config), costs.n_keys(call, stag.cross_window))


def mlp_flops(config: ModelConfig) -> int:
    """Returns 2 d_model d_ff a matrix: three of them for swiglu, two for others, none for none."""
    if config.mlp == "rwkv":  # key, value, and a receptance of width d_model
        return 2 * config.d_model * (2 * config.d_ff + config.d_model)
    n_matrices = {"swiglu": 3, "none": 0}.get(config.mlp, 2)
    return 2 * config.d_model * config.d_ff * n_matrices


def inattention_flops(config: ModelConfig, n_keys: float) -> float:
    """Returns what a layer costs a token with the keys and values of all n_keys tokens at hand.

    As softmax attention with keys and values of d_memory numbers; rotary numbers beside the content
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
