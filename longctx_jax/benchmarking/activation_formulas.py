"""What a compiled call holds beside its arguments and results, by formula: its temporaries.

Unlike caches and parameters this is an estimate: the compiler decides. What it was seen to do, and
what is counted, at the widest point of a call (docs/memory_accounting.md has the accuracy):

    new cache     the loop over layers writes the caches anew, so a donated cache exists twice
                  while it runs; of rings, which are lent (kv_cache.py), only the new tokens do
    weights       of one repeat of the pattern, cut out of the stack, in the dtype of products
    layer cache   of one repeat: cut out, and keys (or values) once more in another order (not of
                  lent rings and one token); more where attention goes through blocks of keys
    activations   rows of one layer's widest half: projections, or the MLP's middle; scores of
                  exact attention twice in float32 (the scores, and their exponentials), and
                  those within chunks of decay and Mamba-2
    output        the output matrix in the dtype of products, for as long as the loop runs
    other stacks  staggered stacks one after another: their weights and, out of lanes, one stack's
                  caches, taken out of the arrays that hold all stacks

Numbers of rows are those of the forms that "auto" takes off a GPU.
"""

from collections.abc import Callable

from longctx_jax.benchmarking.cache_formulas import (
    Terms,
    cache_bytes,
    cache_terms,
    layer_terms,
    number_bytes,
    state_bytes,
)
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.initial_cache import choose_cache, d_memory, d_rotary
from longctx_jax.models.stack import MIXERS, mixer_kind
from longctx_jax.models.staggered_state import decodes_in_lanes
from longctx_jax.nn.initial_forms import TILE_LEN
from longctx_jax.ops.attention import DENSE_MAX_SCORES, KEY_BLOCK_LEN, MIN_BAND_LEN

PROGRAMS = ("prefill", "step", "loop")
RING_MIXERS = ("softmax", "sliding")
RESLICED = 1.5  # of a layer's cache: taken out of the stack, and its keys laid out anew
SCORE_COPIES = 2  # of scores, float32: before and after the exponential
ROW_COPIES = 3  # of a tile of rows made of ids: embeddings, with positions, normed
ROW_SCORE_COPIES = 3  # of scores of rows: those of other attention, and the bias


def temporary_terms(
    config: ModelConfig,
    program: str,
    *,
    batch_size: int,
    seq_len: int,
    max_len: int,
    layer_numbers: int,
) -> Terms:
    """Returns the estimated bytes of a call's temporaries by what they hold.

    Args:
        config: with its pattern filled in.
        program: "prefill" (seq_len tokens, the cache donated), "step" (the same of one token) or
            "loop" (the loop over tokens of `decoding.generate`).
        batch_size: rows.
        seq_len: tokens of the call; 1 in a step or a loop.
        max_len: of the cache.
        layer_numbers: parameters of all layers, staggered ones' cross-attention included.
    """
    seq_len = seq_len if program == "prefill" else 1
    cache = cache_bytes(config, batch_size, max_len)
    if config.name == "inattention":
        return _initial_terms(config, program, batch_size, max_len, cache, layer_numbers)
    is_staggered = config.name == "stagformer"
    stag = config.stagformer
    in_lanes = is_staggered and decodes_in_lanes(config) and seq_len == 1
    n_repeats = config.n_layers // len(config.pattern)
    n_cells = n_repeats  # repeats of the pattern in the arrays that a loop over layers walks along
    if is_staggered and (in_lanes or stag.share_weights):
        n_cells = n_repeats // stag.n_stacks
    lent = _lent_bytes(config, batch_size, max_len, seq_len)
    new_tokens = _lent_bytes(config, batch_size, seq_len, seq_len)
    terms = {
        "new_cache": _cache_copies(config, program) * (cache - lent) + new_tokens,
        "weights": layer_numbers // n_cells * number_bytes(config),
        "layer_cache": _layer_cache(config, cache, lent, seq_len, max_len) // n_repeats,
        "activations": batch_size * _widest(config, seq_len, max_len),
    }
    if in_lanes:
        terms["layer_cache"] *= stag.n_stacks
        terms["activations"] *= stag.n_stacks
    elif is_staggered and seq_len == 1:  # the lane of a stack is taken out
        cross = cache_terms(config, batch_size, max_len).get("cross", 0)
        terms["layer_cache"] = (cache - cross) // stag.n_stacks
    elif is_staggered:
        weights = 0 if stag.share_weights else layer_numbers * number_bytes(config)
        lane = cache // stag.n_stacks if decodes_in_lanes(config) else 0
        terms["other_stacks"] = weights + lane
    if program == "loop" and config.dtype != "float32":
        terms["output"] = config.d_model * config.vocab_size * number_bytes(config)
    return terms


def _initial_terms(
    config: ModelConfig,
    program: str,
    batch_size: int,
    max_len: int,
    cache: int,
    layer_numbers: int,
) -> Terms:
    """Returns those of a model whose layers read one memory: one token passes through them.

    The memory is written in place; what is made of it is scores (of rows), a tile of rows (of
    ids), or tables by id.
    """
    kind, size = choose_cache(config, max_len), number_bytes(config)
    heads, vocab, width = config.n_heads, config.vocab_size, d_memory(config) + d_rotary(config)
    is_of_layers = kind == "kv" and not config.inattention.share_projections
    is_table = config.inattention.memory_position == "none" and not d_rotary(config)
    made = {
        "kv": is_of_layers * cache / config.n_layers
        + SCORE_COPIES * batch_size * heads * max_len * 4,
        "embedding": ROW_SCORE_COPIES * batch_size * heads * max_len * state_bytes(config),
        "ids": batch_size * ROW_COPIES * min(TILE_LEN, max_len) * width * size,
        "counts": 0,
    }
    if is_table and kind in ("ids", "counts"):
        scores = max_len if kind == "ids" else vocab
        made[kind] = vocab * (config.d_model + d_memory(config)) * size
        made[kind] += SCORE_COPIES * batch_size * heads * scores * 4
    return {
        "new_cache": cache if program == "prefill" and is_of_layers else 0,
        "weights": layer_numbers // config.n_layers * size,
        "activations": int(made[kind]),
    }


def _cache_copies(config: ModelConfig, program: str) -> int:
    """Returns how often a call holds caches beside its argument."""
    copies = 1
    if config.recurrence != "none" and program == "prefill":
        copies += 1  # the attention caches that the next segment starts with
    elif config.recurrence == "rmt":
        copies += 1  # both outcomes of whether the segment ends here
    return copies


def _lent_bytes(config: ModelConfig, batch_size: int, max_len: int, seq_len: int) -> int:
    """Returns the bytes of the rings that a call of seq_len tokens reads where they lie."""
    stag = config.stagformer
    is_staggered = config.name == "stagformer"
    if config.recurrence != "none" or 0 < config.segment_len < seq_len:
        return 0
    mixers = [mixer_kind(config, kind) for kind in config.pattern]
    rings = [sum(layer_terms(config, m, max_len).values()) for m in mixers if m in RING_MIXERS]
    lent = batch_size * config.n_layers // len(mixers) * sum(rings)
    if is_staggered and stag.cross_cache != "memory":
        lent += cache_terms(config, batch_size, max_len).get("cross", 0)
    return lent


def _layer_cache(config: ModelConfig, cache: int, lent: int, seq_len: int, max_len: int) -> int:
    """Returns the bytes of all repeats' caches while the model is at work on them."""
    resliced, of_lent = RESLICED, 1.0 if seq_len == 1 else RESLICED
    capacity = max((_ring_len(config, kind, max_len) for kind in config.pattern), default=0)
    if seq_len > 1 and min(seq_len, capacity - 1) * capacity > DENSE_MAX_SCORES:
        resliced, of_lent = 2 * RESLICED, 1.5 * RESLICED
    return int(resliced * (cache - lent) + of_lent * lent)


def _ring_len(config: ModelConfig, kind: str, max_len: int) -> int:
    """Returns how many tokens the ring of exact attention in a layer holds; 0 = it has none."""
    mixer = mixer_kind(config, kind)
    if mixer not in RING_MIXERS:
        return 0
    if config.recurrence != "none" and (config.recurrence != "armt" or kind == "armt"):
        max_len = config.memory.segment_len + 2 * config.memory.n_memory_tokens
    return min(config.sliding.window_len, max_len) if mixer == "sliding" else max_len


def _widest(config: ModelConfig, seq_len: int, max_len: int) -> int:
    """Returns the bytes of activations at the widest point of a layer, one row of the batch."""
    if config.recurrence != "none" and seq_len > 1:
        seq_len = min(seq_len, config.memory.segment_len) + 2 * config.memory.n_memory_tokens
    halves = [seq_len * mlp_numbers(config) * number_bytes(config)]
    for kind in config.pattern:
        mixer = mixer_kind(config, kind)
        if mixer not in ROW_NUMBERS or mixer not in SCORE_NUMBERS:
            raise ValueError(
                f"activation formulas know the mixers {sorted(ROW_NUMBERS)}: got {mixer!r} in "
                f"config.model.pattern={config.pattern}; add it to ROW_NUMBERS and SCORE_NUMBERS "
                "in longctx_jax/benchmarking/activation_formulas.py"
            )
        rows = seq_len * ROW_NUMBERS[mixer](config) * number_bytes(config)
        scores = SCORE_NUMBERS[mixer](config, seq_len, _ring_len(config, kind, max_len))
        halves.append(rows + scores * state_bytes(config))
    return max(halves)


def mlp_numbers(config: ModelConfig) -> int:
    """Returns the numbers a token that the MLP's middle holds."""
    return 0 if config.mlp == "none" else config.d_ff


def _heads(config: ModelConfig) -> int:
    inputs = config.n_heads * config.d_key + config.n_kv_heads * (config.d_key + config.d_value)
    return inputs + config.n_heads * config.d_value


def _decay_rows(config: ModelConfig) -> int:
    gate = 0 if config.decay.gate == "none" else config.n_heads * config.d_value
    return _heads(config) + gate


def _vq_rows(config: ModelConfig) -> int:
    gate = 0 if config.vq.gate == "none" else config.n_heads * config.d_value
    return _heads(config) + gate


def _rwkv_rows(config: ModelConfig) -> int:
    """Version 4: three shifted inputs, their products, the average; 6: five, and the decay."""
    return (7 if config.rwkv.version == 4 else 13) * config.d_model


def _mamba_rows(config: ModelConfig) -> int:
    """Input before and after the convolution and the gate; version 2 scans chunks of heads too."""
    return (3 if config.mamba.version == 1 else 5) * MIXERS["mamba"](config).d_inner


def _softmax_scores(config: ModelConfig, seq_len: int, ring_len: int) -> int:
    """Returns scores of the tokens among themselves, or onto the ring, whichever are more."""
    own = 0 if seq_len == 1 else _pairs(seq_len, seq_len)
    n_reaching = min(seq_len, max(1, ring_len - 1))
    return SCORE_COPIES * config.n_heads * max(own, _pairs(n_reaching, ring_len))


def _sliding_scores(config: ModelConfig, seq_len: int, ring_len: int) -> int:
    """Returns those of tiles of a window, each against two, or of the ring."""
    tile = max(config.sliding.window_len, MIN_BAND_LEN)
    if seq_len <= 2 * tile:
        return _softmax_scores(config, seq_len, ring_len)
    own = -(-seq_len // tile) * tile * 2 * tile
    n_reaching = min(seq_len, max(1, ring_len - 1))
    return SCORE_COPIES * config.n_heads * max(own, _pairs(n_reaching, ring_len))


def _pairs(n_queries: int, n_keys: int) -> int:
    """Returns the pairs whose scores exist at once: all, or those of a block of keys."""
    if n_queries * n_keys <= DENSE_MAX_SCORES:
        return n_queries * n_keys
    return n_queries * min(n_keys, KEY_BLOCK_LEN)


def _vq_scores(config: ModelConfig, seq_len: int, ring_len: int) -> int:
    """Returns those of a block onto the window, itself and the codes, for all blocks of a call."""
    del ring_len
    vq = config.vq
    block = min(vq.block_len or vq.window_len, seq_len)
    n_codes = vq.codebook_size if vq.use_table else 0
    return config.n_heads * seq_len * (vq.window_len + block + n_codes)


def _decay_scores(config: ModelConfig, seq_len: int, ring_len: int) -> int:
    del ring_len
    state = config.d_key * config.d_value
    return config.n_heads * _chunked(seq_len, config.decay.chunk_len, state)


def _mamba_scores(config: ModelConfig, seq_len: int, ring_len: int) -> int:
    """Returns none for version 1, which scans channels."""
    del ring_len
    mixer = MIXERS["mamba"](config)
    if mixer.version == 1:
        return 0
    state = mixer.d_state * mixer.head_len
    return mixer.d_inner // mixer.head_len * _chunked(seq_len, mixer.chunk_len, state)


def _chunked(seq_len: int, chunk_len: int, state: int) -> int:
    """Returns a head's scores within chunks, with decays and without, and a state a chunk."""
    if seq_len == 1:
        return 0
    return SCORE_COPIES * seq_len * min(seq_len, chunk_len) + -(-seq_len // chunk_len) * state


def _no_scores(config: ModelConfig, seq_len: int, ring_len: int) -> int:
    del config, seq_len, ring_len
    return 0


# Mixer -> numbers a token in dtype; numbers of scores, from (config, tokens, slots of the ring).
ROW_NUMBERS: dict[str, Callable[[ModelConfig], int]] = {
    "softmax": _heads,
    "sliding": _heads,
    "decay": _decay_rows,
    "vq": _vq_rows,
    "rwkv": _rwkv_rows,
    "mamba": _mamba_rows,
}
SCORE_NUMBERS: dict[str, Callable[[ModelConfig, int, int], int]] = {
    "softmax": _softmax_scores,
    "sliding": _sliding_scores,
    "decay": _decay_scores,
    "vq": _vq_scores,
    "rwkv": _no_scores,
    "mamba": _mamba_scores,
}
