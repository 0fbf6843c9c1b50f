"""What a compiled call holds beside its arguments and results, by formula: its temporaries.

Unlike caches and parameters this is an estimate: the compiler decides. What it was seen to do, and
what is counted, at the widest point of a call (docs/accounting.md has the accuracy):

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

import jax
import jax.numpy as jnp

from longctx_jax.accounting.caches import Terms, cache_bytes, cache_shapes, rings, tree_bytes
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.decoder import Decoder
from longctx_jax.models.inattention.cache import choose_cache, d_memory, d_rotary
from longctx_jax.models.stack import make_mixer, mixer_kind, sizes_of
from longctx_jax.models.stagformer.state import decodes_in_lanes
from longctx_jax.nn.contract import Call
from longctx_jax.nn.costs import SCORE_COPIES
from longctx_jax.nn.inattention.forms import TILE_LEN
from longctx_jax.nn.kv_cache import KVCache
from longctx_jax.ops.attention import prefers_dense

PROGRAMS = ("prefill", "step", "loop")
RESLICED = 1.5  # of a layer's cache: taken out of the stack, and its keys laid out anew
ROW_COPIES = 3  # of a tile of rows made of ids: embeddings, with positions, normed
ROW_SCORE_COPIES = 3  # of scores of rows: those of other attention, and the bias


def temporary_terms(
    model: Decoder,
    program: str,
    *,
    batch_size: int,
    seq_len: int,
    max_len: int,
    layer_numbers: int,
) -> Terms:
    """Returns the estimated bytes of a call's temporaries by what they hold.

    Args:
        model: whose call it is.
        program: "prefill" (seq_len tokens, the cache donated), "step" (the same of one token) or
            "loop" (the loop over tokens of `decoding.generate`).
        batch_size: rows.
        seq_len: tokens of the call; 1 in a step or a loop.
        max_len: of the cache.
        layer_numbers: parameters of all layers, staggered ones' cross-attention included.
    """
    config = model.config
    seq_len = seq_len if program == "prefill" else 1
    cache = cache_bytes(model, batch_size, max_len)
    if config.name == "inattention":
        return _initial_terms(config, program, batch_size, max_len, cache, layer_numbers)
    is_staggered = config.name == "stagformer"
    stag = config.stagformer
    in_lanes = is_staggered and decodes_in_lanes(config) and seq_len == 1
    n_repeats = config.n_layers // len(config.pattern)
    n_cells = n_repeats  # repeats of the pattern in the arrays that a loop over layers walks along
    if is_staggered and (in_lanes or stag.share_weights):
        n_cells = n_repeats // stag.n_stacks
    lent = _lent_bytes(model, batch_size, max_len, seq_len)
    new_tokens = _lent_bytes(model, batch_size, seq_len, seq_len)
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
        terms["layer_cache"] = tree_bytes(cache_shapes(model, batch_size, max_len).layers[0])
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


def _lent_bytes(model: Decoder, batch_size: int, max_len: int, seq_len: int) -> int:
    """Returns the bytes of the rings that a call of seq_len tokens reads where they lie."""
    config = model.config
    if config.recurrence != "none" or 0 < config.segment_len < seq_len:
        return 0
    return tree_bytes(list(rings(cache_shapes(model, batch_size, max_len).layers)))


def _layer_cache(config: ModelConfig, cache: int, lent: int, seq_len: int, max_len: int) -> int:
    """Returns the bytes of all repeats' caches while the model is at work on them."""
    resliced, of_lent = RESLICED, 1.0 if seq_len == 1 else RESLICED
    capacity = max((_ring_len(config, kind, max_len) for kind in config.pattern), default=0)
    widths = config.d_key + config.d_value
    sizes = (min(seq_len, capacity - 1), capacity, config.n_heads, config.n_kv_heads, widths)
    if seq_len > 1 and not prefers_dense(*sizes):
        resliced, of_lent = 2 * RESLICED, 1.5 * RESLICED
    return int(resliced * (cache - lent) + of_lent * lent)


def _ring_len(config: ModelConfig, kind: str, max_len: int) -> int:
    """Returns how many tokens the ring of exact attention in a layer holds; 0 = it has none."""
    mixer = make_mixer(config, mixer_kind(config, kind))
    longest = _longest(config, kind, max_len)
    cache = jax.eval_shape(lambda: mixer.init_cache(1, longest))  # pyright: ignore
    return cache.capacity if isinstance(cache, KVCache) else 0


def _longest(config: ModelConfig, kind: str, max_len: int) -> int:
    """Returns the tokens that a layer looks back on: those of a segment inside a memory."""
    if config.recurrence != "none" and (config.recurrence != "armt" or kind == "armt"):
        return config.memory.segment_len + 2 * config.memory.n_memory_tokens
    return max_len


def _widest(config: ModelConfig, seq_len: int, max_len: int) -> int:
    """Returns the bytes of activations at the widest point of a layer, one row of the batch."""
    if config.recurrence != "none" and seq_len > 1:
        seq_len = min(seq_len, config.memory.segment_len) + 2 * config.memory.n_memory_tokens
    halves = [seq_len * mlp_numbers(config) * number_bytes(config)]
    for kind in config.pattern:
        mixer = mixer_kind(config, kind)
        call = Call(seq_len, cache_len=_longest(config, kind, max_len))
        found = config.mixers[mixer].costs(sizes_of(config), config.of(mixer), call)
        rows = seq_len * found.rows * number_bytes(config)
        halves.append(rows + found.scores * state_bytes(config))
    return max(halves)


def number_bytes(config: ModelConfig) -> int:
    """Returns the bytes of a number of config.dtype: of keys, values, and matrix products."""
    return jnp.dtype(config.dtype).itemsize


def state_bytes(config: ModelConfig) -> int:
    """Returns the bytes of a number of a running state: float32, wider if dtype is."""
    return max(4, number_bytes(config))


def mlp_numbers(config: ModelConfig) -> int:
    """Returns the numbers a token that the MLP's middle holds."""
    return 0 if config.mlp == "none" else config.d_ff
