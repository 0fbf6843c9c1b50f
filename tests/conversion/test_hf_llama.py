"""Checkpoints of the reference library: equal logits, equal tensors back, refusals by name."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longctx_jax.conversion import hf_config, hf_llama
from longctx_jax.conversion import safetensors_files as files
from longctx_jax.models import build_model
from tests.conversion.conftest import GOLDEN
from tests.helpers import assert_close, random_variables


def load(folder):
    """Returns a checkpoint's model, parameters and tensors."""
    model = build_model(hf_config.model_fields(files.read_json(folder / "config.json")))
    found = files.find_tensors(folder)
    hf_llama.require_tensors(model, found)
    tensors = {name: files.read_float32(found[name], name) for name in found}
    return model, hf_llama.to_params(model, tensors.__getitem__), tensors


def fields_of(name, **changes):
    return hf_config.model_fields(files.read_json(GOLDEN / name / "config.json") | changes)


def test_logits_equal_the_references(case):
    model, params, _ = load(case)
    tokens = jnp.asarray(np.load(case / "tokens.npy"))
    logits = model.apply({"params": params, "model_state": {}}, tokens).logits
    assert_close(logits, np.load(case / "logits.npy"), rel_rms=2e-6)  # observed up to 5.5e-7


def test_tensors_and_config_come_back(case, tmp_path):
    model, params, tensors = load(case)
    back = hf_llama.to_tensors(model, params)
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    config = hf_config.hf_config(model.config, context_len=32, dtype="float32", eos_token_id=2)
    given = files.read_json(case / "config.json")
    assert hf_config.model_fields(config) == hf_config.model_fields(given)
    same = ("model_type", "architectures", "eos_token_id", "layer_types")
    assert [config.get(name) for name in same] == [given.get(name) for name in same]
    files.write_tensors(tmp_path, back)
    written = files.find_tensors(tmp_path)
    assert {t.dtype for t in written.values()} == {"F32"}
    read = files.read_float32(written[hf_llama.TABLE], hf_llama.TABLE)
    assert np.array_equal(read, tensors[hf_llama.TABLE])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_reference_library_loads_what_we_write(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model, params, _ = load(case)
    files.write_tensors(tmp_path, hf_llama.to_tensors(model, params))
    config = hf_config.hf_config(model.config, context_len=64, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = theirs(torch.from_numpy(np.load(case / "tokens.npy")).long()).logits
    assert_close(logits.numpy(), np.load(case / "logits.npy"), rel_rms=1e-6)


def test_bfloat16_out_and_in_is_one_rounding(tmp_path):
    model, params, tensors = load(GOLDEN / "untied_llama3_sharded")
    rounded = {
        name: array.astype(ml_dtypes.bfloat16)
        for name, array in hf_llama.to_tensors(model, params).items()
    }
    files.write_tensors(tmp_path, rounded)
    found = files.find_tensors(tmp_path)
    assert {t.dtype for t in found.values()} == {"BF16"}
    name = "model.layers.1.mlp.down_proj.weight"
    expected = tensors[name].astype(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(files.read_float32(found[name], name), expected)


def test_an_own_embedding_scale_is_multiplied_in():
    fields = {"n_layers": 1, "d_model": 8, "n_heads": 2, "vocab_size": 7, "tie_embeddings": False}
    model = build_model(fields)
    params = random_variables(model.init, jax.random.key(0))["params"]
    tensors = hf_llama.to_tensors(model, params)
    exported = hf_config.hf_config(model.config, context_len=8, dtype="float32")
    other = build_model(hf_config.model_fields(exported))
    assert (model.config.embed_scale, other.config.embed_scale) == (8**0.5, 1.0)
    tokens = jnp.arange(6)[None]
    logits = [
        m.apply({"params": p, "model_state": {}}, tokens).logits
        for m, p in ((model, params), (other, hf_llama.to_params(other, tensors.__getitem__)))
    ]
    assert_close(logits[0], logits[1], rel_rms=1e-6)


# tensors that do not fit


def test_all_tensors_that_differ_are_listed(checkpoint):
    folder = checkpoint("tied_mha")
    _, _, tensors = load(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 16), np.int8)
    tensors |= {"score.weight": np.zeros((1, 2)), "x.rotary_emb.inv_freq": np.zeros(2)}
    files.write_tensors(folder, tensors)
    with pytest.raises(ValueError) as caught:
        load(folder)
    for text in (
        "4 differ",
        "model.layers.1.mlp.up_proj.weight (24, 16) is missing",
        "model.norm.weight is (3,), not (16,)",
        "model.layers.0.self_attn.q_proj.weight is I8, not one of",
        "score.weight (1, 2) has no place",
    ):
        assert text in str(caught.value)
    assert "inv_freq" not in str(caught.value)


def test_a_tied_output_matrix_must_be_the_table(checkpoint):
    folder = checkpoint("tied_mha")
    _, params, tensors = load(folder)
    model = build_model(fields_of("tied_mha"))
    tensors[hf_llama.OUTPUT] = tensors[hf_llama.TABLE].copy()
    files.write_tensors(folder, tensors)
    found = files.find_tensors(folder)
    hf_llama.require_tensors(model, found)
    hf_llama.require_tied(model, params, found)
    tensors[hf_llama.OUTPUT][0, 0] += 1
    files.write_tensors(folder, tensors)
    with pytest.raises(ValueError, match="tie_word_embeddings is true, and lm_head.weight is not"):
        hf_llama.require_tied(model, params, files.find_tensors(folder))


def test_layers_are_counted_before_they_are_listed():
    with pytest.raises(ValueError, match="num_hidden_layers must fit .* got 1000000000 layers"):
        hf_llama.require_layers(10**9, 20)


# config.json

REFUSED = {
    "family": ({"model_type": "gemma"}, "model_type must be one of .* got 'gemma'"),
    "no family": ({"model_type": None}, "model_type must be one of"),
    "bias": ({"attention_bias": True}, "attention_bias has no exact counterpart"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias has no exact counterpart"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act .* got 'gelu'"),
    "quantised": ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .*'awq'"),
    "half rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor .* got 0.5"),
    "rope": (
        {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling.rope_type .* got 'dynamic'",
    ),
    "rope a layer": ({"rope_parameters": {"full_attention": {}}}, "rope_parameters has no exact"),
    "truncate": (
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
        "rope_parameters.truncate .* got False",
    ),
    "no factor": ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a number"),
    "text": ({"hidden_size": "16"}, "hidden_size must be a positive whole number: got '16'"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive"),
    "heads": ({"num_attention_heads": 3, "head_dim": None}, "num_attention_heads must divide"),
    "nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number"),
    "large": ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a number"),
    "switch": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_mapped_is_refused_by_name(name):
    changes, match = REFUSED[name]
    with pytest.raises(ValueError, match=rf"config\.json: {match}"):
        fields_of("untied_llama3_sharded", **changes)


def test_layer_types_of_qwen3():
    types = ["full_attention", "sliding_attention"]
    assert fields_of("qwen3_mixed")["pattern"] == ("softmax", "sliding")
    older = {"layer_types": None, "max_window_layers": 1}
    assert fields_of("qwen3_mixed", **older)["pattern"] == ("softmax", "sliding")
    four = {"layer_types": types * 2, "num_hidden_layers": 4}
    assert fields_of("qwen3_mixed", **four)["pattern"] == ("softmax", "sliding")
    four["layer_types"] = types + types[::-1]
    assert len(fields_of("qwen3_mixed", **four)["pattern"]) == 4
    with pytest.raises(ValueError, match="layer_types must list 2 layers"):
        fields_of("qwen3_mixed", layer_types=types[:1])
    with pytest.raises(ValueError, match=r"layer_types .*got 'chunked_attention'"):
        fields_of("qwen3_mixed", layer_types=["full_attention", "chunked_attention"])
    with pytest.raises(ValueError, match="use_sliding_window must give a window"):
        fields_of("qwen3_mixed", use_sliding_window=False)


def test_older_files_are_read_alike():
    """Before version 5: rope_theta and rope_scaling, and no head counts where they are usual."""
    older = {"rope_parameters": None, "rope_theta": 500.0}
    scaling = dict(files.read_json(GOLDEN / "untied_llama3_sharded/config.json")["rope_parameters"])
    del scaling["rope_theta"]
    older["rope_scaling"] = {"type": scaling.pop("rope_type"), **scaling}
    assert fields_of("untied_llama3_sharded", **older) == fields_of("untied_llama3_sharded")
    mha = {"num_key_value_heads": None, "head_dim": None}
    assert fields_of("tied_mha", **mha) == fields_of("tied_mha")


def test_yarn_amplitude():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    softmax = fields_of("yarn_float16", rope_parameters=rope)["softmax"]
    assert (softmax["rope_low_turns"], softmax["rope_high_turns"]) == (1.0, 32.0)
    assert softmax["rope_amplitude"] == 0.0
    rope |= {"mscale": 2.0, "mscale_all_dim": 1.0}
    softmax = fields_of("yarn_float16", rope_parameters=rope)["softmax"]
    assert softmax["rope_amplitude"] == pytest.approx(
        (0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1), rel=1e-12
    )
    rope["attention_factor"] = 0.7
    assert fields_of("yarn_float16", rope_parameters=rope)["softmax"]["rope_amplitude"] == 0.7


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "decay"}, "name is 'decay', not 'transformer'.*pattern is .'decay',."),
        ({"mlp": "gelu", "norm": "layer"}, "mlp is 'gelu', not 'swiglu'.*norm is 'layer'"),
        ({"d_value": 6}, "d_value is 6, not 4"),
        ({"softmax": {"position": "none"}}, "softmax.position .* is not 'rotary'"),
        ({"pattern": ("softmax", "sliding")}, "qk_norm is off"),
        (
            {"pattern": ("softmax", "sliding"), "sliding": {"rope_theta": 5.0}},
            "softmax and sliding have other rope_ fields",
        ),
        ({"embed_scale": 2.0}, "embed_scale is 2.0, and embeddings are tied"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_named(changes, match):
    model = build_model({"n_layers": 2, "d_model": 8, "n_heads": 2, **changes})
    with pytest.raises(ValueError, match=match):
        hf_config.hf_config(model.config, context_len=8, dtype="float32")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    model, _, tensors = load(GOLDEN / "tied_mha")
    name = next(name for name in tensors if "down_proj" in name)
    broken = {**tensors, name: tensors[name].copy()}
    broken[name][1, 1] = bad
    with pytest.raises(ValueError, match=rf"must be finite: {name} has 1 numbers"):
        hf_llama.to_params(model, broken.__getitem__)
