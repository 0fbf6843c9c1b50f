"""`config.json` of a LLaMA-family checkpoint and the fields of `config.model`, both ways.

Families: "llama", "mistral", "qwen3". Every field is mapped as the reference implementation reads
it, known to change no number there (`HARMLESS`), or refused by name: a field that nobody has looked
at may be the one that makes other logits.

Source: transformers 5.23, models/{llama,mistral,qwen3} and modeling_rope_utils.py.
"""

import math
from collections.abc import Collection
from typing import Any

from longctx_jax.models.config import ModelConfig

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
KIND_OF_LAYER = {"full_attention": "softmax", "sliding_attention": "sliding"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_THETA = 10_000.0  # where config.json has none, like those below
WINDOW_LEN = 4096
SILU = ("silu", "swish")  # one function
_MAPPED = """
    model_type hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size
    num_key_value_heads head_dim rms_norm_eps tie_word_embeddings hidden_act attention_bias mlp_bias
    sliding_window use_sliding_window max_window_layers layer_types rope_theta rope_scaling
    rope_parameters max_position_embeddings original_max_position_embeddings partial_rotary_factor
    quantization_config bos_token_id eos_token_id
"""
_MAPPED_ROPE = """
    rope_type type rope_theta factor original_max_position_embeddings low_freq_factor
    high_freq_factor beta_slow beta_fast attention_factor mscale mscale_all_dim truncate
    partial_rotary_factor
"""
# Of storage, initialisation, training, or of how tokens are drawn: no logit depends on them. Names
# that begin with "_" are the library's own notes.
_HARMLESS = """
    architectures torch_dtype dtype transformers_version use_cache initializer_range pretraining_tp
    attention_dropout hidden_dropout resid_pdrop embd_pdrop name_or_path pad_token_id sep_token_id
    unk_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id tokenizer_class
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate
    torchscript tf_legacy_loss use_bfloat16 pruned_heads finetuning_task task_specific_params
    id2label label2id num_labels problem_type is_decoder is_encoder_decoder tie_encoder_decoder
    add_cross_attention cross_attention_hidden_size chunk_size_feed_forward prefix
    gradient_checkpointing cache_implementation do_sample temperature top_k top_p typical_p
    min_length max_length max_new_tokens num_beams num_beam_groups num_return_sequences
    early_stopping diversity_penalty repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens
    exponential_decay_length_penalty remove_invalid_values max_sequence_length
    neftune_noise_alpha
"""
MAPPED, MAPPED_ROPE, HARMLESS = (
    frozenset(names.split()) for names in (_MAPPED, _MAPPED_ROPE, _HARMLESS)
)
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 10_000  # each is listed before the tensors are counted


def model_fields(given: dict[str, Any], ignored: Collection[str] = ()) -> dict[str, Any]:
    """Returns the fields of `config.model`, nested as there, that compute what `given` describes.

    Args:
        given: content of config.json.
        ignored: unknown fields that the caller knows to change nothing.

    Raises:
        ValueError: a field that is missing, impossible, unknown, or has no exact counterpart.
    """
    family = given.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"config.json: model_type must be one of {list(FAMILIES)}: got {family!r:.200}; only "
            "these compute what our transformer does"
        )
    _refuse_unknown(given, MAPPED | HARMLESS | set(ignored), "")
    _refuse_other_maths(given, family)
    n_layers = _size(given, "num_hidden_layers")
    if n_layers > MAX_LAYERS:
        raise _impossible("num_hidden_layers", n_layers, f"be at most {MAX_LAYERS}")
    n_heads = _size(given, "num_attention_heads")
    d_model = _size(given, "hidden_size")
    is_told = family == "llama" or "num_key_value_heads" in given  # the others' default is a number
    if is_told and given.get("num_key_value_heads") is None:
        n_kv_heads = n_heads
    else:
        n_kv_heads = _size(given, "num_key_value_heads")
    if given.get("head_dim") is None and family != "qwen3":
        if d_model % n_heads:
            raise _impossible("num_attention_heads", n_heads, f"divide hidden_size={d_model}")
        d_key = d_model // n_heads
    else:
        d_key = _size(given, "head_dim")
    kinds = _layer_kinds(given, family, n_layers)
    _require_token_ids(given)
    attention = {"position": "rotary", "qk_norm": family == "qwen3", **_rope_fields(given)}
    fields = {
        "name": "transformer",
        "pattern": _shortest_pattern(kinds),
        "n_layers": n_layers,
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_key": d_key,
        "d_value": d_key,
        "mlp": "swiglu",
        "d_ff": _size(given, "intermediate_size"),
        "norm": "rms",
        "norm_eps": _number(given, "rms_norm_eps", 1e-6),
        "vocab_size": _size(given, "vocab_size"),
        "tie_embeddings": _switch(given, "tie_word_embeddings"),
        "embed_scale": 1.0,
        "softmax": attention,
    }
    if "sliding" in kinds:
        fields["sliding"] = {**attention, "window_len": _size(given, "sliding_window", WINDOW_LEN)}
    return fields


def hf_config(model: ModelConfig, *, context_len: int, dtype: str, **ids: int) -> dict[str, Any]:
    """Returns the content of config.json for a model.

    Args:
        model: of the run.
        context_len: tokens the model was used with: `max_position_embeddings`, unless rotary
            frequencies are scaled for more. The reference library does not compute with it.
        dtype: of the tensors, "float32" or "bfloat16".
        **ids: bos_token_id and eos_token_id, where there are any.

    Raises:
        ValueError: if no family computes what the model does; names every field in the way.
    """
    _require_exportable(model)
    attention = model.of(model.pattern[0])
    scaled_len = round(attention.rope_original_len * attention.rope_factor)
    kinds = [model.pattern[layer % len(model.pattern)] for layer in range(model.n_layers)]
    family = "qwen3" if attention.qk_norm else "mistral" if "sliding" in kinds else "llama"
    config = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.d_key,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "max_position_embeddings": max(context_len, scaled_len),
        "rope_theta": attention.rope_theta,
        "rope_scaling": _rope_scaling(attention),
        "torch_dtype": dtype,
        **ids,
    }
    if "sliding" in kinds:
        config["sliding_window"] = model.of("sliding").window_len
    if family == "llama":
        config["mlp_bias"] = False
    if family == "qwen3":
        names = {kind: name for name, kind in KIND_OF_LAYER.items()}
        config["layer_types"] = [names[kind] for kind in kinds]
        config["use_sliding_window"] = "sliding" in kinds
    return config


def _refuse_unknown(given: dict[str, Any], known: Collection[str], where: str) -> None:
    unknown = sorted(n for n in given if n not in known and not n.startswith("_"))
    if unknown:
        names = ", ".join(f"{where}{name}={given[name]!r:.80}" for name in unknown[:20])
        raise ValueError(
            f"config.json: {len(unknown)} fields are not known to change nothing: got {names}; if "
            "the reference implementation of this family does not read them, name them in "
            "--ignore_fields"
        )


def _require_token_ids(given: dict[str, Any]) -> None:
    """Raises ValueError if a text begins or ends with an id that is no token's."""
    vocab_size = _size(given, "vocab_size")
    for name in ("bos_token_id", "eos_token_id"):
        ids = given.get(name)
        for index in ids if isinstance(ids, list) else [ids]:
            is_id = isinstance(index, int) and not isinstance(index, bool)
            if index is not None and not (is_id and 0 <= index < vocab_size):
                raise _impossible(name, index, f"be below vocab_size={vocab_size}")


def _refuse_other_maths(given: dict[str, Any], family: str) -> None:
    read = {"llama": ("attention_bias", "mlp_bias"), "qwen3": ("attention_bias",)}
    for name in read.get(family, ()):  # the others have no bias whatever the file says
        if _switch(given, name):
            raise _unsupported(name, given[name], "our linear maps have no bias")
    if given.get("hidden_act", "silu") not in SILU:
        raise _unsupported("hidden_act", given["hidden_act"], "our gated MLP has silu")
    if given.get("quantization_config") is not None:
        method = given["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise _unsupported("quantization_config", method, "save the weights unquantised")
    if given.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        value = given["partial_rotary_factor"]
        raise _unsupported("partial_rotary_factor", value, "we rotate whole heads")


def _layer_kinds(given: dict[str, Any], family: str, n_layers: int) -> list[str]:
    """Returns the mixer of each layer."""
    if family == "llama":
        return ["softmax"] * n_layers
    has_window = given.get("sliding_window", WINDOW_LEN) is not None
    if family == "qwen3":
        has_window = has_window and _switch(given, "use_sliding_window")
    types = given.get("layer_types")
    if types is None and family == "mistral":
        return ["sliding" if has_window else "softmax"] * n_layers
    if types is None:
        first = _size(given, "max_window_layers", 28) if has_window else n_layers
        return ["softmax" if layer < first else "sliding" for layer in range(n_layers)]
    if not isinstance(types, list) or len(types) != n_layers:
        raise _impossible("layer_types", types, f"list {n_layers} layers (num_hidden_layers)")
    for kind in types:
        if not isinstance(kind, str) or kind not in KIND_OF_LAYER:
            raise _unsupported("layer_types", kind, f"known are {list(KIND_OF_LAYER)}")
    if "sliding_attention" in types and not has_window:
        name = "use_sliding_window" if family == "qwen3" else "sliding_window"
        raise _impossible(name, given.get(name), "give a window where layer_types slide")
    return [KIND_OF_LAYER[kind] for kind in types]


def _shortest_pattern(kinds: list[str]) -> tuple[str, ...]:
    n_layers = len(kinds)
    for period in range(1, n_layers + 1):
        if n_layers % period == 0 and kinds == kinds[:period] * (n_layers // period):
            return tuple(kinds[:period])
    raise AssertionError("the whole list is a period")


def _rope_fields(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the rope_ fields of config.model.softmax.

    Newer files have `rope_parameters` with the base in it, older ones `rope_theta` and, for longer
    contexts, `rope_scaling`. Where there are both, the older name counts, whole.
    """
    where = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    rope = given.get(where) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise _unsupported(where, rope, "we have one kind of rotation for all layers")
    _refuse_unknown(rope, MAPPED_ROPE, f"{where}.")
    if "factor" in rope and "rope_type" not in rope and "type" not in rope:
        rule = f"say what its factor is of ({', '.join(ROPE_TYPES[1:])})"
        raise _impossible(f"{where}.rope_type", None, rule)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise _unsupported(f"{where}.rope_type", kind, f"known are {list(ROPE_TYPES)}")
    theta = rope if rope.get("rope_theta") is not None else given
    fields: dict[str, Any] = {"rope_theta": _number(theta, "rope_theta", ROPE_THETA)}
    if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        value = rope["partial_rotary_factor"]
        raise _unsupported(f"{where}.partial_rotary_factor", value, "we rotate whole heads")
    if kind == "default":
        return fields
    fields |= {"rope_scaling": kind, "rope_factor": _number(rope, "factor")}
    if kind == "linear":
        return fields
    name = "original_max_position_embeddings"
    places = [place for place in (given, rope) if place.get(name) is not None]
    if places:  # the one beside the others counts before the one in the dict
        fields["rope_original_len"] = _size(places[0], name)
    else:
        fields["rope_original_len"] = _size(given, "max_position_embeddings")
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        return fields | {"rope_low_turns": low, "rope_high_turns": high}
    if rope.get("truncate", True) is not True:
        raise _unsupported(f"{where}.truncate", rope["truncate"], "we round to whole indices")
    low, high = (
        _number(rope, name, usual) for name, usual in (("beta_slow", 1), ("beta_fast", 32))
    )
    fields |= {"rope_low_turns": low, "rope_high_turns": high}
    return fields | {"rope_amplitude": _yarn_amplitude(rope, fields["rope_factor"])}


def _yarn_amplitude(rope: dict[str, Any], factor: float) -> float:
    """Returns config.model.softmax.rope_amplitude; 0 = what the factor gives."""
    if rope.get("attention_factor") is not None:
        amplitude = _number(rope, "attention_factor")
        if not amplitude:
            raise _impossible(
                "attention_factor", amplitude, "be positive: scores are times its square"
            )
        return amplitude
    scales = [_number(rope, name, 0.0) for name in ("mscale", "mscale_all_dim")]
    if not all(scales):
        return 0.0
    grown = math.log(max(factor, 1.0))
    return (0.1 * scales[0] * grown + 1.0) / (0.1 * scales[1] * grown + 1.0)


def _rope_scaling(attention: Any) -> dict[str, Any] | None:
    """Returns `rope_scaling` of config.json."""
    kind = attention.rope_scaling
    if kind == "none":
        return None
    rope: dict[str, Any] = {"rope_type": kind, "factor": attention.rope_factor}
    if kind == "linear":
        return rope
    rope["original_max_position_embeddings"] = attention.rope_original_len
    low, high = attention.rope_low_turns, attention.rope_high_turns
    if kind == "llama3":
        return rope | {"low_freq_factor": low, "high_freq_factor": high}
    rope |= {"beta_slow": low, "beta_fast": high}
    amplitude = attention.rope_amplitude
    return rope | ({"attention_factor": amplitude} if amplitude else {})


def _require_exportable(model: ModelConfig) -> None:
    """Raises ValueError unless a family computes what the model does."""
    used = [model.of(kind) for kind in set(model.pattern) & {"softmax", "sliding"}]
    first = used[0] if used else model.of("softmax")
    problems = [
        f"config.model.{field} is {value!r}, not {wanted!r}"
        for field, value, wanted in (
            ("name", model.name, "transformer"),
            ("mlp", model.mlp, "swiglu"),
            ("norm", model.norm, "rms"),
            ("d_value", model.d_value, model.d_key),
        )
        if value != wanted
    ]
    if set(model.pattern) - {"softmax", "sliding"}:
        problems.append(f"config.model.pattern is {model.pattern}, not softmax and sliding")
    if any(config.position != "rotary" for config in used):
        problems.append("config.model.softmax.position (or sliding) is not 'rotary'")
    if len(used) > 1 and not first.qk_norm:
        problems.append(f"config.model.pattern is {model.pattern}, and qk_norm is off")
    alike = {(c.qk_norm, c.rope_theta, c.rotary_scaling) for c in used}
    if len(alike) > 1:
        problems.append("config.model.softmax and sliding have other rope_ fields or qk_norm")
    if model.tie_embeddings and model.embed_scale != 1.0:
        problems.append(f"config.model.embed_scale is {model.embed_scale}, and embeddings are tied")
    if problems:
        raise ValueError(
            f"a LLaMA-family checkpoint must compute what the model does: {'; '.join(problems)}; "
            "only such models can be exported"
        )


def _size(given: dict[str, Any], name: str, default: int | None = None) -> int:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= MAX_SIZE:
        raise _impossible(name, value, "be a positive whole number")
    return value


def _number(given: dict[str, Any], name: str, default: float | None = None) -> float:
    value: Any = given.get(name)
    value = default if value is None else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 1e30:
        raise _impossible(name, value, "be a number that is not negative")
    return float(value)


def _switch(given: dict[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        raise _impossible(name, value, "be true or false")
    return bool(value)


def _impossible(name: str, value: Any, rule: str) -> ValueError:
    return ValueError(
        f"config.json: {name} must {rule}: got {value!r:.200}; compare the file with the "
        "original one"
    )


def _unsupported(name: str, value: Any, reason: str) -> ValueError:
    return ValueError(
        f"config.json: {name} has no exact counterpart here: got {value!r:.200}; {reason}, so "
        "convert another checkpoint"
    )
