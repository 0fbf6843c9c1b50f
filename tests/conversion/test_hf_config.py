"""config.json is read as the reference library reads it, or refused by name: a table of readings.

READINGS were looked up in the library's configuration classes and `modeling_rope_utils.py`.
"""

import random

import pytest

from longctx_jax.conversion import hf_config
from longctx_jax.conversion import safetensors_files as files
from tests.conversion.conftest import GOLDEN

LLAMA = files.read_json(GOLDEN / "tied_mha/config.json")
QWEN3 = files.read_json(GOLDEN / "qwen3_mixed/config.json")
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": 8}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
WITHOUT = "without"  # the field is not in the file


def read(given, ignored=(), **changes):
    given = {**given, **changes}
    given = {name: value for name, value in given.items() if value != WITHOUT}
    return hf_config.model_fields(given, ignored)


def rope(given, **changes):
    softmax = read(given, rope_parameters=WITHOUT, **changes)["softmax"]
    names = ("rope_scaling", "rope_factor", "rope_original_len")
    return {name: softmax.get(name) for name in names}


# given, changes, what of the fields is expected
READINGS = [
    (MISTRAL, {}, {"pattern": ("sliding",)}),
    (MISTRAL, {"sliding_window": None}, {"pattern": ("softmax",)}),
    (MISTRAL, {"sliding_window": WITHOUT}, {"pattern": ("sliding",), "window_len": 4096}),
    (
        MISTRAL,
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"pattern": ("softmax", "sliding"), "window_len": 8},
    ),
    (MISTRAL, {"attention_bias": True}, {"pattern": ("sliding",)}),  # it has none, whatever it says
    (MISTRAL, {"num_key_value_heads": None}, {"n_kv_heads": LLAMA["num_attention_heads"]}),
    (QWEN3, {"sliding_window": WITHOUT}, {"pattern": ("softmax", "sliding"), "window_len": 4096}),
    (QWEN3, {"use_sliding_window": False, "layer_types": None}, {"pattern": ("softmax",)}),
    (LLAMA, {"sliding_window": 8, "use_sliding_window": True}, {"pattern": ("softmax",)}),
    (LLAMA, {"hidden_act": "swish"}, {"mlp": "swiglu"}),
    (LLAMA, {"attention_dropout": 0.1, "use_cache": False, "_name_or_path": "x"}, {}),
    (LLAMA, {"eos_token_id": [1, 2]}, {}),
]


@pytest.mark.parametrize("case", range(len(READINGS)))
def test_readings(case):
    given, changes, expected = READINGS[case]
    fields = read(given, **changes)
    found = {**fields, "window_len": fields.get("sliding", {}).get("window_len")}
    assert {name: found[name] for name in expected} == expected


def test_the_older_name_counts_where_there_are_both():
    both = read(LLAMA, rope_scaling=LINEAR, rope_parameters=YARN)["softmax"]
    assert (both["rope_scaling"], both["rope_factor"]) == ("linear", 2.0)
    empty = read(LLAMA, rope_scaling={}, rope_parameters=LINEAR)["softmax"]
    assert empty["rope_scaling"] == "linear"


def test_the_length_beside_the_others_counts_before_the_one_within():
    alone = rope(LLAMA, rope_scaling=YARN)
    assert alone == {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 8}
    both = rope(LLAMA, rope_scaling=YARN, original_max_position_embeddings=16)
    assert both["rope_original_len"] == 16
    neither = {name: YARN[name] for name in ("rope_type", "factor")}
    length = rope(LLAMA, rope_scaling=neither)["rope_original_len"]
    assert length == LLAMA["max_position_embeddings"]


REFUSED = [
    ({"rope_scaling": {"factor": 8}}, r"rope_scaling\.rope_type must say what its factor is of"),
    ({"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor must be positive"),
    ({"rope_scaling": {**YARN, "long_factor": [1.0]}}, r"rope_scaling\.long_factor=\[1\.0\]"),
    ({"eos_token_id": 10**6}, "eos_token_id must be below vocab_size"),
    ({"bos_token_id": -1}, "bos_token_id must be below vocab_size"),
    ({"logit_scale": 0.5}, r"1 fields are not known .* logit_scale=0\.5.*--ignore_fields"),
    ({"attention_multiplier": 2, "query_scale": 3}, "2 fields"),
    ({"text_config": {"hidden_size": 4}}, "text_config"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=str)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        read(LLAMA, rope_parameters=WITHOUT, **changes)


def test_a_named_field_is_ignored():
    assert read(LLAMA, ["logit_scale"], logit_scale=0.5) == read(LLAMA)


def test_no_field_of_a_config_is_passed_over():
    """Any field that is not known is refused, alone or in the dict of rotations."""
    draw = random.Random(0)
    known = hf_config.MAPPED | hf_config.MAPPED_ROPE | hf_config.HARMLESS
    for _ in range(300):
        name = draw.choice(sorted(known)) + draw.choice(["s", "_new", "2", "x"])
        if name in known:
            continue
        for given in (LLAMA, MISTRAL, QWEN3):
            with pytest.raises(ValueError, match=rf"{name}=1"):
                read(given, **{name: 1})
        with pytest.raises(ValueError, match=rf"rope_scaling\.{name}=1"):
            read(LLAMA, rope_scaling={**LINEAR, name: 1})


def test_fields_of_storage_change_nothing():
    for given in (LLAMA, QWEN3):
        for name in hf_config.HARMLESS:
            assert read(given, **{name: 1}) == read(given)
