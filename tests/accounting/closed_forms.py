"""The bytes of every model's cache in closed form, as docs/accounting.md has them.

With w the bytes of a number of `dtype`, and s those of a state (4, or 8 with float64), a row of the
batch needs:

    softmax, sliding   C H_kv (K + V) w + 8 C + 4,     C = max_len, at most the window
    decay              H K V s + 4, and (conv_len - 1) (d w + 4) with a convolution
    vq                 W H_kv ((K + V) w + 4) + H_kv S (V s + 4) + 4 W + 8,    window W, S codes
    rwkv 4, rwkv 6     d w + 3 d s,     d w + H K V s;     and d w of the channel mix
    mamba              I n s + (conv_len - 1) (width w + 4),    I = expand d, n numbers of state
    armt               the mixer's of T + 2 M tokens, 2 nu m (d + heads) s / heads + 4
    layerwise          the mixer's of T + 2 M tokens, M d w + 4
    rmt                the mixer's of T + 2 M tokens; M d w + 4 once a model
    stagformer         the mixer's; C H_kv (K + V) w + 8 C + 4 a layer of an upper stack, or
                       C d w + 8 C + 4 once a stack (cross_cache "memory"); d w + 1 at the top
    inattention        8, and, once a model: C (d_memory + d_rotary) w (embedding), C i (ids, of i
                       bytes), n_exact i + 4 V or H V s (counts); kv: as softmax, or once

and a model 8 (its last segment id and document), with memory between segments 4 more.
"""

import collections
from collections.abc import Callable

import jax.numpy as jnp

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.inattention.cache import choose_cache, d_memory, d_rotary
from longctx_jax.models.stack import make_mixer, mixer_kind
from longctx_jax.nn.blocks import RECURRENT_MLPS
from longctx_jax.nn.inattention.memory import id_dtype

Terms = dict[str, int]  # bytes by what they hold, in the order of `TERMS`
INT = 4  # bytes of an int32


def closed_form(config: ModelConfig, batch_size: int, max_len: int) -> int:
    """Returns the bytes of the model's cache; `config` has its pattern filled in."""
    family = FAMILIES[config.name] if config.recurrence == "none" else recurrent_terms
    ids_and_documents = 2 * INT
    return batch_size * (sum(family(config, max_len).values()) + ids_and_documents)


def layer_terms(config: ModelConfig, kind: str, max_len: int) -> Terms:
    """Returns the terms of one layer's mixer and MLP, one row."""
    terms = MIXER_TERMS[kind](config, max_len)
    if config.mlp in RECURRENT_MLPS:
        terms["history"] = terms.get("history", 0) + config.d_model * number_bytes(config)
    return terms


def number_bytes(config: ModelConfig) -> int:
    """Returns the bytes of a number of config.dtype: of keys, values, and matrix products."""
    return jnp.dtype(config.dtype).itemsize


def state_bytes(config: ModelConfig) -> int:
    """Returns the bytes of a number of a running state: float32, wider if dtype is."""
    return max(4, number_bytes(config))


def ring_terms(config: ModelConfig, capacity: int) -> Terms:
    """Returns keys, values and bookkeeping of `capacity` slots, one row."""
    numbers = capacity * config.n_kv_heads * number_bytes(config)
    return {
        "keys": numbers * config.d_key,
        "values": numbers * config.d_value,
        "slots": slot_bytes(capacity),
    }


def slot_bytes(capacity: int) -> int:
    """Returns a position and a document a slot, and the position of the next token."""
    return 2 * INT * capacity + INT


def softmax_terms(config: ModelConfig, max_len: int) -> Terms:
    """Returns those of full attention."""
    return ring_terms(config, max_len)


def sliding_terms(config: ModelConfig, max_len: int) -> Terms:
    """Returns those of a window."""
    return ring_terms(config, min(config.of("sliding").window_len, max_len))


def decay_terms(config: ModelConfig, max_len: int) -> Terms:
    """Returns a matrix a head, and the inputs that a convolution still needs."""
    del max_len
    past = max(0, config.of("decay").conv_len - 1)
    return {
        "slots": INT + INT * past,
        "state": config.n_heads * config.d_key * config.d_value * state_bytes(config),
        "history": past * config.d_model * number_bytes(config),
    }


def vq_terms(config: ModelConfig, max_len: int) -> Terms:
    """Returns a ring of the window with the codes of its keys, and a mean and count a code."""
    del max_len
    fields, heads = config.of("vq"), config.n_kv_heads
    window, n_codes = fields.window_len, fields.codebook_size
    numbers = window * heads * number_bytes(config)
    mean = config.d_value * state_bytes(config)
    return {
        "keys": numbers * config.d_key,
        "values": numbers * config.d_value,
        "slots": INT * window + 2 * INT,
        "codes": INT * window * heads,
        "table": heads * n_codes * (mean + INT),
    }


def rwkv_terms(config: ModelConfig, max_len: int) -> Terms:
    """Returns the last token, and three numbers a channel (4) or a matrix a head (6)."""
    del max_len
    mixer = make_mixer(config, "rwkv")
    n = 3 * config.d_model
    if mixer.config.version == 6:
        n = mixer.sizes.n_heads * mixer.sizes.d_key * mixer.sizes.d_value
    return {
        "state": n * state_bytes(config),
        "history": config.d_model * number_bytes(config),
    }


def mamba_terms(config: ModelConfig, max_len: int) -> Terms:
    """Returns n numbers a channel, and the inputs that the convolution still needs."""
    del max_len
    inner, fields = make_mixer(config, "mamba").d_inner, make_mixer(config, "mamba").config
    past, width = fields.conv_len - 1, inner
    if fields.version == 2:
        width += 2 * fields.n_groups * fields.d_state
    return {
        "slots": INT * past,
        "state": inner * fields.d_state * state_bytes(config),
        "history": past * width * number_bytes(config),
    }


def plain_terms(config: ModelConfig, max_len: int) -> Terms:
    """Returns those of all layers, one after another."""
    total: collections.Counter[str] = collections.Counter()
    for kind in config.pattern:
        total += _times(config.n_layers // len(config.pattern), layer_terms(config, kind, max_len))
    return dict(total)


def recurrent_terms(config: ModelConfig, max_len: int) -> Terms:
    """Returns those of layers of which some start anew with each segment, and of their memory."""
    memory, d = config.memory, config.d_model
    tokens = {"tokens": memory.n_memory_tokens * d * number_bytes(config), "slots": INT}
    total: collections.Counter[str] = collections.Counter(slots=INT)  # place in the segment
    for kind in config.pattern:
        is_local = config.recurrence != "armt" or kind == "armt"
        longest = memory.segment_len + 2 * memory.n_memory_tokens
        if not is_local:
            longest = max_len + memory.n_memory_tokens
        layer = collections.Counter(layer_terms(config, mixer_kind(config, kind), longest))
        if kind == "armt":
            n_features = 2 * memory.nu * memory.d_memory // memory.n_heads
            layer["state"] += n_features * (d + memory.n_heads) * state_bytes(config)
            layer["slots"] += INT
        elif config.recurrence == "layerwise":
            layer += collections.Counter(tokens)
        total += _times(config.n_layers // len(config.pattern), layer)
    if config.recurrence == "rmt":
        total += collections.Counter(tokens)
    return dict(total)


def staggered_terms(config: ModelConfig, max_len: int) -> Terms:
    """Returns those of all stacks, what upper ones keep of those below, and the handover."""
    stag = config.stagformer
    n_upper = stag.n_stacks - (0 if stag.stack_axis else 1)  # over devices, one lane is idle
    total = collections.Counter(plain_terms(config, max_len))
    capacity = min(stag.cross_window or max_len, max_len)
    row = config.d_model * number_bytes(config)
    if stag.handoff == "cross" and stag.cross_cache == "memory":
        total["cross"] += n_upper * (capacity * row + slot_bytes(capacity))
    elif stag.handoff == "cross" and stag.cross_window != 1:
        n_layers = n_upper * config.n_layers // stag.n_stacks
        total["cross"] += n_layers * sum(ring_terms(config, capacity).values())
    total["cross"] += n_upper * row + 1  # newest outputs, and whether there are any
    return dict(total)


def initial_terms(config: ModelConfig, max_len: int) -> Terms:
    """Returns the one memory of all layers in the form that the config chooses, or keys a layer."""
    kind, width = choose_cache(config, max_len), d_rotary(config)
    slots = {"slots": 2 * INT}  # position, start of the document
    if kind == "kv":
        n = 1 if config.inattention.share_projections else config.n_layers
        ring = _times(n, ring_terms(config, max_len))
        ring["keys"] += n * max_len * config.n_kv_heads * width * number_bytes(config)
        return dict(ring + collections.Counter(slots))
    if kind == "embedding":
        return slots | {"rows": max_len * (d_memory(config) + width) * number_bytes(config)}
    id_bytes = jnp.dtype(id_dtype(config.vocab_size)).itemsize
    if kind == "ids":
        return slots | {"ids": max_len * id_bytes}
    position = config.inattention.score_position
    window = config.inattention.n_exact if position == "near" else 0
    counts = config.vocab_size * INT
    if position == "alibi":
        counts = config.n_heads * config.vocab_size * state_bytes(config)
    return slots | {"ids": window * id_bytes, "counts": counts}


def _times(n: int, terms: Terms) -> collections.Counter[str]:
    return collections.Counter({name: n * value for name, value in terms.items()})


# (config, max_len) -> terms of one layer and one row
MIXER_TERMS: dict[str, Callable[[ModelConfig, int], Terms]] = {
    "softmax": softmax_terms,
    "sliding": sliding_terms,
    "decay": decay_terms,
    "vq": vq_terms,
    "rwkv": rwkv_terms,
    "mamba": mamba_terms,
}
# config.model.name -> (config, max_len) -> terms of one row; layers with a memory go before it
FAMILIES: dict[str, Callable[[ModelConfig, int], Terms]] = {
    "transformer": plain_terms,
    "transformer_vq": plain_terms,
    "decay": plain_terms,
    "recurrent_memory": recurrent_terms,
    "stagformer": staggered_terms,
    "inattention": initial_terms,
}
