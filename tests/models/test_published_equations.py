"""Tiny models against float64 numpy transcriptions of what the papers publish.

Logits, and gradients as derivatives along random directions: those of the model by `jax.grad`,
those of the transcription by differences. See tests/golden/README.md.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from tests.golden.equations import armt, decay, mamba, rmt, rwkv, transformer_vq
from tests.golden.equations.common import StopGradient
from tests.golden.equations.differences import check_gradients
from tests.helpers import assert_close, in_float64, make_normal

TINY = {"n_layers": 2, "d_model": 8, "n_heads": 2, "vocab_size": 7, "d_ff": 12}
N_TOKENS = 13

RETNET = {"kind": "retnet", "position": "rotary", "chunk_len": 4}
TRANSNORMER = {
    "kind": "transnormer",
    "depth": "linear",
    "position": "none",
    "chunk_len": 5,
    "feature_map": "silu",
    "gate": "sigmoid",
    "head_norm": "plain_rms",
}
VQ = {"codebook_size": 5, "window_len": 4, "block_len": 3, "position_theta": 100.0}
NO_BIAS = {**VQ, "position": "none"}
ARMT = {"segment_len": 4, "n_memory_tokens": 2, "d_memory": 4, "nu": 2}
RWKV4 = {"version": 4, "chunk_len": 4}
RWKV6 = {"version": 6, "shift_rank": 2, "decay_rank": 3, "chunk_len": 4}
MAMBA1 = {"version": 1, "d_state": 3, "step_rank": 2, "conv_len": 4, "chunk_len": 4}
MAMBA2 = {"version": 2, "d_state": 3, "head_len": 4, "conv_len": 4, "chunk_len": 4}


def of_decay(options, **fields):
    return decay.language_model, {
        "name": "decay",
        "d_key": 4,
        "d_value": 6,
        "decay": options,
        **fields,
    }


def of_vq(options, **fields):
    return transformer_vq.language_model, {"name": "transformer_vq", "vq": options, **fields}


def of_armt(options, **fields):
    return armt.language_model, {
        "name": "recurrent_memory",
        "memory": {**ARMT, **options},
        **fields,
    }


def of_rwkv(options, **fields):
    return rwkv.language_model, {"pattern": ("rwkv",), "mlp": "rwkv", "rwkv": options, **fields}


def of_mamba(options, **fields):
    return mamba.language_model, {"pattern": ("mamba",), "mlp": "none", "mamba": options, **fields}


GATED_UNIT = {"n_heads": 1, "d_value": 10, "mlp": "none"}  # single-head gated attention
GQA = {"n_heads": 4, "n_kv_heads": 2, "d_key": 4, "d_value": 3}
PUBLISHED_RWKV = {"norm": "layer", "norm_eps": 1e-5}

# transcription and fields of the model; TINY holds the others
CASES = {
    "retnet": of_decay(RETNET),
    "gated_retention": of_decay({**RETNET, "kind": "gated", "position": "none"}),
    "gated_retention_alone": of_decay({**RETNET, "kind": "gated"}, mlp="none", n_layers=1),
    "lightning": of_decay({**TRANSNORMER, "kind": "lightning", "head_norm": "rms"}),
    "transnormer": of_decay(TRANSNORMER),
    "decay_learned_layer_norm": of_decay(
        {**RETNET, "kind": "learned", "head_norm": "layer"}, n_kv_heads=1
    ),
    "decay_none_elu": of_decay({**RETNET, "kind": "none", "feature_map": "elu"}, mlp="gelu"),
    "decay_gated_convolution": of_decay(
        {**TRANSNORMER, "kind": "gated", "conv_len": 3}, norm="layer"
    ),
    "decay_gqa_no_gate": of_decay(
        {**RETNET, "kind": "learned", "gate": "none", "implementation": "chunked"}, **GQA
    ),
    "decay_retnet_with_depth": of_decay({**RETNET, "depth": "linear", "chunk_len": 16}),
    "decay_untied": of_decay({**RETNET, "kind": "gated", "chunk_len": 3}, tie_embeddings=False),
    "vq_mha": of_vq({**NO_BIAS, "block_len": 4}),
    "vq_gqa": of_vq(NO_BIAS, **GQA, mlp="relu2"),
    "vq_mqa": of_vq({**NO_BIAS, "block_len": 2, "window_len": 6}, n_kv_heads=1),
    "vq_gated_unit": of_vq({**NO_BIAS, "gate": "silu"}, **GATED_UNIT),
    "vq_mha_relative": of_vq({**VQ, "block_len": 4}),
    "vq_gqa_relative": of_vq(VQ, **GQA, mlp="relu2"),
    "vq_mqa_relative": of_vq({**VQ, "block_len": 5, "window_len": 6}, n_kv_heads=1),
    "vq_gated_unit_relative": of_vq({**VQ, "gate": "silu", "block_len": 1}, **GATED_UNIT),
    "vq_no_table": of_vq({**NO_BIAS, "use_table": False}),
    "vq_no_table_relative": of_vq({**VQ, "use_table": False}),
    "vq_no_gradient_through_cache": of_vq({**NO_BIAS, "grad_through_cache": False}),
    "vq_window_of_one": of_vq({**NO_BIAS, "window_len": 1, "block_len": 4}),
    "vq_window_of_all": of_vq({**NO_BIAS, "window_len": 20}),
    "vq_quadratic": of_vq({**NO_BIAS, "implementation": "quadratic"}),
    "vq_reduction_matmul": of_vq({**NO_BIAS, "reduction": "matmul"}),
    "vq_reduction_associative": of_vq({**NO_BIAS, "reduction": "associative"}),
    "armt": of_armt({}),
    "armt_two_heads": of_armt({"n_heads": 2, "d_memory": 6, "nu": 3}),
    "armt_no_correction": of_armt({"correction": False}),
    "armt_no_denominator": of_armt({"use_denominator": False}),
    "armt_normalized": of_armt({"normalize": True, "n_memory_tokens": 3}),
    "armt_eps": of_armt({"eps": 0.1, "segment_len": 6}),
    "armt_many_segments": of_armt({"segment_len": 2, "n_memory_tokens": 1, "eps": 0.01}),
    "armt_one_layer": of_armt({"segment_len": 5, "nu": 1}, n_layers=1),
    "armt_diagonal": of_armt({}, schedule="diagonal"),
    "rmt": (rmt.language_model, {"name": "recurrent_memory", "memory": {**ARMT, "kind": "rmt"}}),
    "layerwise_memory": (
        rmt.layerwise,
        {"name": "recurrent_memory", "memory": {**ARMT, "kind": "layerwise"}},
    ),
    "rwkv4": of_rwkv(RWKV4, **PUBLISHED_RWKV),
    "rwkv4_swiglu": of_rwkv({**RWKV4, "chunk_len": 5}, mlp="swiglu"),
    "rwkv6": of_rwkv(RWKV6, **PUBLISHED_RWKV),
    "rwkv6_swiglu_head_len": of_rwkv({**RWKV6, "head_len": 2, "chunk_len": 16}, mlp="swiglu"),
    "rwkv6_wide_values": of_rwkv({**RWKV6, "chunk_len": 3}, d_value=6, n_layers=1),
    "rwkv4_recurrent": of_rwkv({**RWKV4, "implementation": "recurrent"}),
    "rwkv6_recurrent": of_rwkv({**RWKV6, "implementation": "recurrent"}),
    "mamba1": of_mamba(MAMBA1, norm_eps=1e-5),
    "mamba1_one_layer": of_mamba(MAMBA1, n_layers=1),
    "mamba1_chunked": of_mamba({**MAMBA1, "implementation": "chunked"}),
    "mamba1_recurrent": of_mamba({**MAMBA1, "implementation": "recurrent"}),
    "mamba1_derived_sizes": of_mamba({**MAMBA1, "step_rank": 0, "d_state": 0, "conv_len": 2}),
    "mamba1_expand_3": of_mamba({**MAMBA1, "expand": 3, "chunk_len": 16}, mlp="swiglu"),
    "mamba2": of_mamba(MAMBA2, norm_eps=1e-5),
    "mamba2_heads_of_8": of_mamba({**MAMBA2, "head_len": 8, "conv_len": 3}, mlp="swiglu"),
    "mamba2_conv_1": of_mamba({**MAMBA2, "conv_len": 1, "d_state": 4, "chunk_len": 16}),
    "mamba2_chunked": of_mamba({**MAMBA2, "implementation": "chunked"}),
    "mamba2_two_groups": of_mamba({**MAMBA2, "n_groups": 2}),
    "mamba2_four_groups": of_mamba({**MAMBA2, "n_groups": 4, "head_len": 2}),
    "mamba2_norm_before_gate": of_mamba({**MAMBA2, "n_groups": 2, "norm_before_gate": True}),
    "mamba2_bounded_steps": of_mamba({**MAMBA2, "min_step": 0.4, "max_step": 0.9}),
    "mamba2_least_step": of_mamba({**MAMBA2, "min_step": 0.6}),
}
# Whole published mixers, as docs/decay.md gives their options.
PUBLISHED = {**TRANSNORMER, "norm_span": "all", "scale_query": False}
CASES["transnormer_llm"] = (
    decay.transnormer_llm,
    of_decay({**PUBLISHED, "gate": "linear"})[1],
)
MINIMAX = {"kind": "lightning", "depth": "minimax", "value_map": "silu", "head_norm": "rms"}
CASES["minimax_01"] = (
    decay.minimax_01,
    of_decay({**PUBLISHED, **MINIMAX})[1],
)
FAST_LOGITS = ["retnet", "vq_gqa_relative", "vq_gated_unit", "armt"]
FAST_LOGITS += ["rwkv4", "rwkv6", "mamba2"]
FAST_GRADIENTS = ["gated_retention_alone", "mamba1_one_layer"]
ONE_EACH = [*FAST_LOGITS, "gated_retention", "lightning", "transnormer", "mamba1", "rmt"]


def cases(names, fast=()):
    """Parameters with the marks of their names."""
    for name in names:
        marks = [] if name in fast else [pytest.mark.slow]
        yield pytest.param(name, id=name, marks=marks)


SPREAD = {"table": 1.0, "decay_bias": 6.0}  # of random leaves by name, else 0.5


def make_variables(model):
    """Returns float64 random variables: no norm, bias, shift or codebook at a neutral value."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    arrays = []
    for i, (path, leaf) in enumerate(leaves):
        name = getattr(path[-1], "key", None) or path[-1].name
        x = make_normal(i, *leaf.shape, scale=SPREAD.get(name, 0.5))
        if name == "scale":
            x = 1.0 + 0.6 * x
        if name == "counts":  # of tokens; one code is all but forgotten, below the floor of 0.01
            x = np.abs(x) + 0.05
            x[..., 0] = 0.004
        arrays.append(x)
    variables = jax.tree.unflatten(tree, arrays)

    def place(codebook):
        """Moves codewords to where keys are."""
        counts = np.maximum(codebook.counts, 0.01)[..., None]
        return codebook._replace(sums=1.6 * counts * codebook.sums)

    def is_codebook(x):
        return hasattr(x, "counts")

    state = jax.tree.map(place, variables["model_state"], is_leaf=is_codebook)
    return {**variables, "model_state": state}


def make_case(name, dtype="float64", **vq):
    """Returns a model, its variables, and tokens [2, N_TOKENS]; the fields are in CASES."""
    fields = CASES[name][1]
    if vq:
        fields = {**fields, "vq": {**fields["vq"], **vq}}
    model = build_model({**TINY, **fields, "dtype": dtype})
    tokens = np.random.default_rng(5).integers(0, TINY["vocab_size"], (2, N_TOKENS))
    return model, make_variables(model), tokens.astype(np.int32)


def transcribe(name, variables, tokens, sg=None):
    """Returns the transcription's logits, [batch, seq, vocab] float64."""
    language_model, fields = CASES[name]
    sg = sg or StopGradient()
    options = {**TINY, **fields}
    return np.stack([language_model(variables, row, options, sg) for row in tokens])


@pytest.mark.parametrize("name", list(cases(FAST_LOGITS, fast=FAST_LOGITS)))
@in_float64
def test_logits(name):
    model, variables, tokens = make_case(name)
    logits = model.apply(variables, tokens).logits
    assert logits.dtype == jnp.float64
    assert_close(logits, transcribe(name, variables, tokens), rel_rms=1e-12)


@pytest.mark.parametrize("name", list(cases(CASES, fast=FAST_GRADIENTS)))
@in_float64
def test_logits_and_gradients(name):
    model, variables, tokens = make_case(name)
    weights = make_normal(9, *tokens.shape, TINY["vocab_size"])

    @jax.jit
    def run(params):
        def loss(params):
            logits = model.apply({**variables, "params": params}, tokens).logits
            return jnp.sum(weights * logits), logits

        return jax.grad(loss, has_aux=True)(params)

    gradients, logits = run(variables["params"])
    sg = StopGradient()
    expected = transcribe(name, variables, tokens, sg)
    assert_close(logits, expected, rel_rms=1e-12)

    def loss(params):
        moved = transcribe(name, {**variables, "params": params}, tokens, sg.rewind())
        return np.sum(weights * moved)

    check_gradients(loss, variables["params"], gradients, 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vq_gqa", "vq_gated_unit"])
@in_float64
def test_gradients_of_the_commitment_loss(name):
    beta = 0.3
    model, variables, tokens = make_case(name, commitment=beta)
    weights = make_normal(9, *tokens.shape, TINY["vocab_size"])

    @jax.jit
    def run(params):
        out = model.apply({**variables, "params": params}, tokens, train=True)
        (aux,) = out.aux
        return jnp.sum(weights * out.logits) + jnp.sum(aux.losses["vq_commitment"])

    sg, options = StopGradient(), {**TINY, **CASES[name][1]}

    def loss(params):
        moved = {**variables, "params": params}
        parts = [transformer_vq.forward(moved, row, options, sg) for row in tokens]
        logits, errors = zip(*parts, strict=True)
        return np.sum(weights * np.stack(logits)) + beta * sum(errors)

    assert_close(run(variables["params"]), loss(variables["params"]), rel_rms=1e-12)
    gradients = jax.jit(jax.grad(run))(variables["params"])
    check_gradients(
        lambda params: (sg.rewind(), loss(params))[1], variables["params"], gradients, 1e-7
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_EACH)
@in_float64
def test_logits_in_several_calls(name):
    model, variables, tokens = make_case(name)
    apply, cache, pieces = jax.jit(model.apply), model.init_cache(2, N_TOKENS), []
    for first, last in [(0, 5), (5, 6), (6, N_TOKENS)]:
        out = apply(variables, tokens[:, first:last], cache)
        cache = out.cache
        pieces.append(np.asarray(out.logits))
    expected = transcribe(name, variables, tokens)
    assert_close(np.concatenate(pieces, axis=1), expected, rel_rms=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_EACH)
def test_float32_logits(name):
    model, variables, tokens = make_case(name, dtype="float32")
    # The transcription sees the same numbers: float32 ones, or codes near a tie might differ.
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), variables)
    logits = model.apply(variables, tokens).logits
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    assert_close(logits, transcribe(name, wide, tokens), rel_rms=4e-6)
