"""The FLOP formulas against the matrix products that the models really contain."""

import math

import jax
import numpy as np
import pytest

from longctx_jax.accounting import flops
from longctx_jax.models import build_model
from longctx_jax.models.config import ModelConfig
from longctx_jax.nn.contract import Call
from longctx_jax.nn.costs import mean_visible_keys

BATCH, SEQ = 2, 24
SIZES = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 40, "vocab_size": 11}


def count_dots(jaxpr) -> int:
    """FLOPs of every dot_general, loop bodies times their trip count."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            width = math.prod(left[axis] for axis in contracted)
            total += 2 * width * math.prod(equation.outvars[0].aval.shape)
        inner = [getattr(v, "jaxpr", v) for v in equation.params.values()]
        trips = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += trips * sum(count_dots(j) for j in inner if hasattr(j, "eqns"))
    return total


def dots_of(model, seq=SEQ):
    variables = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((BATCH, seq), np.int32)
    return count_dots(jax.make_jaxpr(model.apply)(variables, tokens).jaxpr)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "transformer"},
        {"name": "transformer", "n_kv_heads": 1, "mlp": "gelu", "d_key": 6, "d_value": 4},
        {"name": "transformer", "pattern": ("sliding",)},
        {"name": "decay", "d_value": 12, "n_kv_heads": 1},
        {"name": "transformer", "pattern": ("decay", "softmax")},
        {"name": "stagformer", "n_kv_heads": 1},
        {"name": "stagformer", "stagformer": {"cross_window": 1, "share_weights": True}},
        {"name": "stagformer", "stagformer": {"handoff": "add"}},
        {
            "name": "inattention",
            "inattention": {"memory_position": "none", "score_position": "alibi"},
        },
        {
            "name": "inattention",
            "n_kv_heads": 1,
            "inattention": {"score_position": "decoupled", "d_rotary": 4, "d_memory": 6},
        },
    ],
    ids=str,
)
def test_formula_counts_every_product_of_the_dense_forms(fields):
    decay = {"chunk_len": 8, "implementation": "two_pass", "kind": "gated"}
    model = build_model(SIZES | fields | {"decay": decay})
    per_token = flops.forward_flops_per_token(model.config, SEQ, pairs="dense")
    assert BATCH * SEQ * per_token == dots_of(model)


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": ("rwkv",), "mlp": "rwkv", "rwkv": {"version": 4}},
        {"pattern": ("mamba",), "mamba": {"version": 1, "implementation": "recurrent"}},
        {
            "pattern": ("mamba",),
            "mamba": {"version": 2, "head_len": 8, "chunk_len": 8, "implementation": "two_pass"},
        },
    ],
    ids=str,
)
def test_formula_counts_every_product_of_recurrences(fields):
    model = build_model(SIZES | fields)
    assert BATCH * SEQ * flops.forward_flops_per_token(model.config, SEQ) == dots_of(model)


@pytest.mark.parametrize("kind", ["armt", "rmt", "layerwise"])
def test_formula_counts_every_product_of_segments_with_memory(kind):
    memory = {"kind": kind, "segment_len": 8, "n_memory_tokens": 3, "d_memory": 4, "n_heads": 2}
    model = build_model(SIZES | {"name": "recurrent_memory", "memory": memory})
    per_token = flops.forward_flops_per_token(model.config, SEQ, pairs="dense")
    assert BATCH * SEQ * per_token == dots_of(model)


@pytest.mark.parametrize("gate", ["none", "silu"])
@pytest.mark.parametrize("window_len, block_len", [(8, 8), (5, 6), (9, 4), (8, 0), (8, 24)])
def test_formula_counts_every_product_of_quantised_attention(window_len, block_len, gate):
    vq = {"codebook_size": 5, "window_len": window_len, "block_len": block_len, "gate": gate}
    fields = {"name": "transformer_vq", "d_value": 12, "n_kv_heads": 1, "mlp": "none", "vq": vq}
    model = build_model(SIZES | fields)
    per_token = flops.forward_flops_per_token(model.config, SEQ, pairs="dense")
    config = model.config
    sinusoids = 2 * config.n_layers * config.d_model * config.d_key * (window_len + 1)
    assert BATCH * SEQ * per_token + sinusoids == dots_of(model)


def test_quantised_attention_sees_codes_once_a_token_has_left_the_window():
    vq = {"codebook_size": 5, "window_len": 4}
    config = build_model(SIZES | {"name": "transformer_vq", "vq": vq}).config
    width = 2 * config.n_heads * (config.d_key + config.d_value)
    tokens = [flops.mixer_flops(config, "vq", Call(1, n_past=n)) for n in range(9)]
    assert [int(b - a) // width for a, b in zip(tokens, tokens[1:], strict=False)] == [
        *(1, 1, 1, 1),  # the fifth token sees five keys
        5,  # the sixth five keys and five codes
        *(0, 0, 0),
    ]
    assert flops.mixer_flops(config, "vq", Call(9)) == pytest.approx(np.mean(tokens))


def test_causal_half_is_the_only_difference_to_dense():
    config = build_model(SIZES).config
    dense = flops.forward_flops_per_token(config, SEQ, pairs="dense")
    masked = 2 * 2 * config.n_heads * (SEQ - (SEQ + 1) / 2) * (config.d_key + config.d_value)
    assert flops.forward_flops_per_token(config, SEQ) == dense - masked
    assert flops.train_flops_per_token(config, SEQ) == 3 * (dense - masked)


@pytest.mark.parametrize(
    "seq, past, reach", [(7, 0, 0), (7, 0, 3), (7, 5, 8), (7, 9, 4), (1, 9, 0)]
)
def test_visible_keys_by_counting(seq, past, reach):
    counted = [min(past + t + 1, reach or math.inf) for t in range(seq)]
    assert mean_visible_keys(seq, past, reach) == pytest.approx(np.mean(counted))


def test_window_and_cache_bound_the_pairs():
    config = build_model(SIZES | {"pattern": ("sliding",), "sliding": {"window_len": 4}}).config
    near = flops.forward_flops_per_token(config, 1, n_past=3)
    assert flops.forward_flops_per_token(config, 1, n_past=1000) == near
    full = build_model(SIZES).config
    assert flops.forward_flops_per_token(full, 1, n_past=1000, cache_len=4) == near


def test_unknown_pairs_are_named():
    with pytest.raises(ValueError, match="pairs must be"):
        flops.forward_flops_per_token(ModelConfig(pattern=("softmax",)), 8, pairs="half")


def test_an_unknown_mixer_is_named_and_not_counted_as_another():
    config = ModelConfig(pattern=("softmax", "convolution"))
    with pytest.raises(ValueError, match=r"one of \['decay', .*got 'convolution'.*mixers="):
        flops.forward_flops_per_token(config, 8)
