"""MLP, embedding, mixers and block: shapes, parameter counts, formulas, dropout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.recurrent_memory.cells import make_associative
from longctx_jax.models.recurrent_memory.config import MemoryConfig
from longctx_jax.nn.blocks import Block
from longctx_jax.nn.contract import Sizes
from longctx_jax.nn.embed import Embed
from longctx_jax.nn.mixers import MIXERS
from longctx_jax.nn.mixers.decay import (
    DecayAttention,
    DecayConfig,
    log_decays,
    log_decays_by_layer,
)
from longctx_jax.nn.mlp import MLP
from tests.helpers import assert_close, make_normal, random_variables, sub_jaxprs

D_MODEL = 8
KEY = jax.random.key(0)


def init(module, *args, **options):
    """Returns random variables of a module; compiling its own initialisers would take seconds."""
    return random_variables(lambda: module.init(KEY, *args, **options))


def n_elements(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def make_mixer(kind, sizes, fields, changes):
    """Returns a mixer's module; changes go to the sizes or the fields that have such a name."""
    names = {field.name for field in dataclasses.fields(Sizes)}
    sizes = {"d_model": D_MODEL, **sizes, **{n: v for n, v in changes.items() if n in names}}
    fields = {**fields, **{n: v for n, v in changes.items() if n not in names}}
    return MIXERS[kind].build(Sizes(**sizes), MIXERS[kind].config(**fields))


def make_decay(**changes):
    sizes = {"n_heads": 2, "n_kv_heads": 2, "d_key": 4, "d_value": 6, "n_layers": 4}
    return make_mixer("decay", sizes, {"chunk_len": 4, "rope_theta": 100.0}, changes)


def make_softmax(**changes):
    sizes = {"n_heads": 4, "n_kv_heads": 2, "d_key": 4, "d_value": 6}
    return make_mixer("softmax", sizes, {"rope_theta": 100.0}, changes)


def count_params(mixer):
    shapes = jax.eval_shape(
        lambda: mixer.init(KEY, jnp.zeros((1, 3, D_MODEL)), None, None, train=False)
    )
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(shapes))
    return n_elements(shapes)


# --- MLP and embedding -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "n_matrices"), [("swiglu", 3), ("gelu", 2)])
def test_mlp(kind, n_matrices):
    mlp = MLP(kind, 12, "float32", 1.0)
    x = jnp.float32(make_normal(0, 2, 3, D_MODEL))
    variables = init(mlp, x)
    y = jax.jit(mlp.apply)(variables, x)
    assert n_elements(variables) == n_matrices * 12 * D_MODEL
    weights = {name: np.asarray(p["kernel"], np.float64) for name, p in variables["params"].items()}
    x = np.asarray(x, np.float64)
    up = x @ weights["up"]
    if kind == "swiglu":
        gate = x @ weights["gate"]
        hidden = gate / (1 + np.exp(-gate)) * up
    else:
        hidden = 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    assert_close(y, hidden @ weights["down"], rel_rms=1e-6)


def test_output_scale_is_a_standard_deviation():
    mlp = MLP("gelu", 512, "float32", 0.1)
    kernels = jax.jit(mlp.init)(KEY, jnp.zeros((1, 256)))["params"]
    assert np.std(kernels["up"]["kernel"]) == pytest.approx(256**-0.5, rel=0.02)
    assert np.std(kernels["down"]["kernel"]) == pytest.approx(0.1 * 512**-0.5, rel=0.02)


@pytest.mark.parametrize("is_tied", [True, False])
def test_embedding(is_tied):
    embed = Embed(11, 16, is_tied, "float32", 1.0 if is_tied else 4.0)
    tokens = jnp.array([[0, 10, 3]])
    variables = init(embed, tokens)
    x = jax.jit(embed.apply)(variables, tokens)
    assert n_elements(variables) == 11 * 16 * (1 if is_tied else 2)
    table = np.asarray(variables["params"]["table"])
    scale = 1.0 if is_tied else 4.0  # sqrt(width)
    assert_close(x, scale * table[[[0, 10, 3]]], rel_rms=1e-6)
    output = embed.apply(variables, method="unembedding")
    assert output.shape == (16, 11)
    assert np.array_equal(output, table.T) == is_tied
    assert np.array_equal(output.T, table if is_tied else variables["params"]["output"])


@pytest.mark.parametrize("is_tied", [True, False])
def test_logits_of_unit_activations_have_unit_variance(is_tied):
    embed = Embed(512, 64, is_tied, "float32", 1.0 if is_tied else 8.0)
    variables = jax.jit(embed.init)(KEY, jnp.zeros((1, 1), jnp.int32))
    hidden = np.random.default_rng(0).standard_normal((50, 64))
    logits = hidden @ np.asarray(embed.apply(variables, method="unembedding"))
    assert np.std(logits) == pytest.approx(1.0, rel=0.03)


# --- mixers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, 0),
        ({"position": "relative"}, 4 * 32),
        ({"qk_norm": True}, 2 * 4),
        ({"position": "none", "n_kv_heads": 4}, D_MODEL * 2 * (4 + 6)),
    ],
    ids=["gqa", "relative", "qk_norm", "mha"],
)
def test_softmax_parameters(changes, extra):
    query, key, value, out = 4 * 4, 2 * 4, 2 * 6, 4 * 6
    assert count_params(make_softmax(**changes)) == D_MODEL * (query + key + value + out) + extra


@pytest.mark.parametrize(
    ("changes", "extra"),
    [
        ({}, 2 * 6 * D_MODEL),
        ({"gate": "none"}, 0),
        ({"kind": "learned", "gate": "none"}, 2),
        ({"kind": "gated", "gate": "none"}, 2 * D_MODEL + 2),
        ({"gate": "none", "head_norm": "plain_rms"}, -6),
        ({"gate": "none", "head_norm": "layer"}, 6),
        ({"gate": "none", "n_kv_heads": 1, "feature_map": "elu"}, -D_MODEL * (4 + 6)),
    ],
    ids=["gate", "plain", "learned", "gated", "plain_rms", "layer_norm", "grouped"],
)
def test_decay_parameters(changes, extra):
    query, key, value, out, norm = 2 * 4, 2 * 4, 2 * 6, 2 * 6, 6
    expected = D_MODEL * (query + key + value + out) + norm + extra
    assert count_params(make_decay(**changes)) == expected


def test_log_decays():
    heads = np.arange(4)
    assert_close(log_decays("retnet", 4), np.log(1 - 2.0 ** (-5.0 - heads)), rel_rms=1e-14)
    assert_close(log_decays("learned", 4), np.log(1 - 2.0 ** (-5.0 - heads)), rel_rms=1e-6)
    assert_close(
        log_decays("lightning", 4), [-(2.0**-2), -(2.0**-4), -(2.0**-6), -(2.0**-8)], rel_rms=1e-6
    )
    assert np.array_equal(log_decays("transnormer", 4), -8 * heads / 4)
    assert np.array_equal(log_decays("none", 4), np.zeros(4))
    assert all(log_decays(kind, 4).dtype == np.float64 for kind in ("retnet", "lightning", "none"))


def test_decays_of_transnormer_fall_with_depth():
    layer, head = np.arange(6)[:, None], np.arange(4)
    expected = -(8 * head / 4) * (1 - layer / 6)  # exp of it: Qin et al. (2023), section 3
    assert_close(log_decays_by_layer("transnormer", "linear", 6, 4), expected, rel_rms=1e-6)
    same = log_decays_by_layer("retnet", "constant", 3, 4)
    assert np.array_equal(same, np.tile(log_decays("retnet", 4), (3, 1)))


@pytest.mark.slow
def test_each_layer_takes_its_own_decay():
    mixer, x = make_decay(depth="linear", kind="lightning"), jnp.float32(make_normal(0, 1, 5, 8))
    params = init(mixer, x, None, None, train=False)

    def run(mixer, layer):
        return mixer.apply(params, x, None, None, layer=layer, train=False)[0]

    alone = make_decay(depth="constant", kind="lightning")
    assert_close(run(mixer, jnp.int32(0)), run(alone, None), rel_rms=1e-6)
    third = jax.jit(run, static_argnums=0)(mixer, jnp.int32(3))
    assert not np.allclose(third, run(alone, None), rtol=1e-2)


@pytest.mark.slow
def test_gated_decay_starts_at_retnet_and_depends_on_the_token():
    mixer, x = make_decay(kind="gated"), jnp.float32(make_normal(0, 1, 6, D_MODEL))
    fresh = jax.jit(lambda: mixer.init(KEY, x, None, None, train=False)["params"])()
    start = jax.nn.log_sigmoid(fresh["decay_bias"]) / 16
    assert_close(start, log_decays("retnet", 2), rel_rms=1e-5)
    closed = {**fresh, "decay_bias": jnp.full(2, -1e4)}  # decays of exp(-625) forget everything

    def run(params, x):
        return mixer.apply({"params": params}, x, None, None, train=False)[0][:, -1]

    moved = x.at[:, :-1].multiply(2.0)
    assert_close(run(closed, moved), run(closed, x), rel_rms=1e-6)
    assert not np.allclose(run(fresh, moved), run(fresh, x), rtol=1e-3)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(run(p, x) ** 2)))(fresh)
    assert np.all(gradient["decay_bias"] != 0) and np.any(gradient["decay_gate"]["kernel"] != 0)


@pytest.mark.parametrize("feature_map", ["none", "silu", "elu"])
@pytest.mark.parametrize("gate", ["none", "silu", "sigmoid"])
def test_decay_mixer_equals_its_formula(feature_map, gate):
    mixer = make_decay(feature_map=feature_map, gate=gate, n_kv_heads=1, position="none")
    x = jnp.float32(make_normal(0, 1, 5, D_MODEL))
    params = init(mixer, x, None, None, train=False)["params"]
    actual = mixer.apply({"params": params}, x, None, None, train=False)[0]
    weights = {n: np.float64(p["kernel"]) for n, p in params.items() if "kernel" in p}
    x = np.float64(x[0])
    maps = {"none": lambda z: z, "silu": lambda z: z / (1 + np.exp(-z))}
    maps["elu"] = lambda z: np.where(z > 0, z + 1, np.exp(np.minimum(z, 0)))
    q = maps[feature_map](x @ weights["query"]).reshape(5, 2, 4)
    k, v = maps[feature_map](x @ weights["key"]), x @ weights["value"]
    time = np.arange(5)
    out = np.zeros((5, 2, 6))
    for h, decay in enumerate(np.exp(log_decays("retnet", 2))):
        mask = np.tril(decay ** np.maximum(time[:, None] - time, 0))
        out[:, h] = (q[:, h] @ k.T * mask) @ v / 2.0  # sqrt of the key width
    scale = np.float64(params["head_norm"]["scale"])
    out = (out / np.sqrt(np.mean(out**2, -1, keepdims=True) + 1e-6) * scale).reshape(5, 12)
    if gate != "none":
        z = x @ weights["gate"]
        out = out * (z / (1 + np.exp(-z)) if gate == "silu" else 1 / (1 + np.exp(-z)))
    assert_close(actual[0], out @ weights["out"], rel_rms=1e-5)


def test_learned_decay_starts_at_retnet_stays_negative_and_learns():
    mixer, x = make_decay(kind="learned"), jnp.float32(make_normal(0, 1, 6, D_MODEL))
    fresh = jax.jit(lambda: mixer.init(KEY, x, None, None, train=False)["params"]["decay_rate"])
    assert_close(-np.logaddexp(0.0, fresh()), log_decays("retnet", 2), rel_rms=1e-6)
    params = init(mixer, x, None, None, train=False)["params"]

    @jax.jit
    @jax.value_and_grad
    def run(params, x):
        y = mixer.apply({"params": params}, x, None, None, train=False)[0]
        return jnp.sum(y[:, -1] ** 2)

    gradient = run(params, x)[1]["decay_rate"]
    assert np.all(np.isfinite(gradient)) and np.all(gradient != 0)
    # However far an optimizer pushes the rate: at one end nothing decays, and nothing grows ...
    rest = {name: p for name, p in params.items() if name != "decay_rate"}
    same = make_decay(kind="none")
    expected = jax.jit(lambda p: same.apply({"params": p}, x, None, None, train=False)[0])(rest)
    keeps_all = run({**params, "decay_rate": jnp.full(2, -1e4)}, x)[0]
    assert_close(keeps_all, jnp.sum(expected[:, -1] ** 2), rel_rms=1e-5)
    # ... and at the other a token sees only itself.
    keeps_none = {**params, "decay_rate": jnp.full(2, 1e4)}
    moved = x.at[:, :-1].multiply(2.0)
    assert_close(run(keeps_none, moved)[0], run(keeps_none, x)[0], rel_rms=1e-6)
    assert abs(run(params, moved)[0] - run(params, x)[0]) > 1e-3


def test_decay_cache_bytes():
    cache = make_decay(dtype="bfloat16").init_cache(3, max_len=1000)
    assert cache.state.nbytes == 3 * 4 * 2 * 4 * 6
    assert cache.state.dtype == jnp.float32 and cache.position.shape == (3,)
    with_history = make_decay(dtype="bfloat16", conv_len=4).init_cache(3, max_len=1000)
    assert with_history.history.nbytes == 3 * 3 * D_MODEL * 2


# --- block -------------------------------------------------------------------------------------


def make_block(dropout=0.0, **changes):
    return Block(
        mixer=make_softmax(),
        **{
            "mlp": "swiglu",
            "d_ff": 12,
            "norm": "rms",
            "dropout": dropout,
            "layer_drop": 0.0,
            "dtype": "float32",
            "output_scale": 1.0,
            **changes,
        },
    )


def test_dropout_only_in_training():
    block, plain = make_block(0.5), make_block()
    x = jnp.float32(make_normal(0, 1, 5, D_MODEL))
    variables = init(plain, x, None)

    def run(block, train):
        return jax.jit(lambda v: block.apply(v, x, None, train=train)[0])(variables)

    expected = run(plain, False)
    assert np.array_equal(run(plain, True), expected)
    assert np.array_equal(run(block, False), expected)
    train = jax.jit(
        lambda key: block.apply(variables, x, None, train=True, rngs={"dropout": key})[0]
    )
    dropped = train(jax.random.key(1))
    assert np.array_equal(train(jax.random.key(1)), dropped)
    assert not np.allclose(train(jax.random.key(2)), dropped)
    assert not np.allclose(dropped, expected)


def test_dropout_falls_on_what_each_half_adds():
    """With everything dropped but the residual, the block is the identity."""
    block = make_block(0.999999)
    x = jnp.float32(make_normal(0, 1, 5, D_MODEL))
    variables = init(make_block(), x, None)
    run = jax.jit(lambda v: block.apply(v, x, None, train=True, rngs={"dropout": KEY})[0])
    y = run(variables)
    assert np.array_equal(y, x)


def test_layer_drop_leaves_out_whole_rows():
    """Half the rows get nothing from a half-block, the others twice of it."""
    block, plain = make_block(layer_drop=0.5, mlp="none"), make_block(mlp="none")
    x = jnp.float32(make_normal(0, 64, 3, D_MODEL))
    variables = init(plain, x, None)
    assert "mlp" not in variables["params"]
    added = jax.jit(lambda v: plain.apply(v, x, None)[0])(variables) - x
    run = jax.jit(lambda v: block.apply(v, x, None, train=True, rngs={"dropout": KEY})[0])
    dropped = run(variables) - x
    share = np.asarray(jnp.sum(dropped * added, (1, 2)) / jnp.sum(added**2, (1, 2)))
    is_kept = share > 1
    assert 16 < is_kept.sum() < 48
    assert_close(dropped, 2 * added * is_kept[:, None, None], rel_rms=1e-5)


# --- vector-quantised attention ----------------------------------------------------------------


def make_vq(**changes):
    sizes = {"n_heads": 2, "n_kv_heads": 1, "d_key": 4, "d_value": 6}
    fields = {
        "codebook_size": 3,
        "window_len": 3,
        "block_len": 2,
        "reduction": "serial",
        "gate": "silu",
        "position_theta": 100.0,
        "commitment": 1.0,
        "codebook_decay": 0.9,
    }
    return make_mixer("vq", sizes, fields, changes)


def test_vq_attention_is_its_formula():
    """Written out in numpy, token by token: positions by distance, codes for keys, gate."""
    mixer = make_vq()
    x = jnp.float32(make_normal(0, 1, 9, D_MODEL))
    variables = jax.tree.map(np.asarray, init(mixer, x, None, None, train=False))
    codebook = variables["model_state"]["codebook"]
    codebook = codebook._replace(counts=1 + np.abs(codebook.counts))
    variables["model_state"]["codebook"] = codebook
    run = jax.jit(lambda v: mixer.apply(v, x, None, None, train=False)[0])
    actual = run(variables)

    p = variables["params"]
    x, unit = np.asarray(x[0], np.float64), 4**-0.25

    def silu(y):
        return y / (1 + np.exp(-y))

    def rms(y):
        return unit * y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + 1e-6)

    query = rms((x @ p["query"]["kernel"]).reshape(9, 2, 4))
    key = rms(x @ p["key"]["kernel"])
    words = codebook.sums[0] / codebook.counts[0][:, None]
    key = words[((key[:, None] - words) ** 2).sum(-1).argmin(-1)]
    value = silu(x @ p["value"]["kernel"])
    out = np.zeros((9, 2, 6))
    for t, h in np.ndindex(9, 2):
        score = (query[t, h] + unit * p["content_bias"][h]) @ key[: t + 1].T
        for s in range(max(0, t - 3), t + 1):
            angle = (t - s) / 100.0 ** (np.arange(0, D_MODEL, 2) / D_MODEL)
            row = unit * np.concatenate([np.sin(angle), np.cos(angle)]) @ p["relative"]["kernel"]
            score[s] += (query[t, h] + unit * p["position_bias"][h]) @ row
        weight = np.exp(score - score.max())
        out[t, h] = weight @ value[: t + 1] / weight.sum()
    gated = out.reshape(9, 12) * silu(x @ p["gate"]["kernel"])
    assert_close(actual[0], gated @ p["out"]["kernel"], rel_rms=1e-5)


def test_vq_aux_only_in_training():
    mixer = make_vq()
    x = jnp.float32(make_normal(0, 2, 5, D_MODEL))
    variables = init(mixer, x, None, None, train=False)
    run = jax.jit(lambda v, train: mixer.apply(v, x, None, None, train=train)[2], static_argnums=1)
    assert jax.tree.leaves(run(variables, False)) == []
    aux = run(variables, True)
    assert set(aux.losses) == {"vq_commitment"} and set(aux.metrics) == {"vq_relative_error"}
    assert float(jnp.sum(aux.statistics["codebook"].counts)) == 2 * 5
    fixed = make_vq(codebook_decay=1.0)
    aux = jax.eval_shape(lambda v: fixed.apply(v, x, None, None, train=True)[2], variables)
    assert aux.statistics == {}


@pytest.mark.slow
def test_vq_position_dropout_needs_training():
    mixer = make_vq(position_dropout=0.5)
    x = jnp.float32(make_normal(0, 1, 5, D_MODEL))
    variables = init(mixer, x, None, None, train=False)

    @functools.partial(jax.jit, static_argnums=1)
    def run(key, train):
        return mixer.apply(variables, x, None, None, train=train, rngs={"dropout": key})[0]

    assert np.array_equal(run(jax.random.key(0), False), run(jax.random.key(1), False))
    assert not np.allclose(run(jax.random.key(0), True), run(jax.random.key(1), True))


# --- block, continued --------------------------------------------------------------------------


def test_block_without_mixer_and_mlp_output_is_the_identity():
    block = make_block(norm="layer", mlp="gelu")
    x = jnp.float32(make_normal(0, 1, 5, D_MODEL))
    params = init(block, x, None)["params"]
    names = ["mixer", "mixer_norm", "mlp", "mlp_norm"]
    assert sorted(params) == names
    params["mixer"]["out"]["kernel"] = 0 * params["mixer"]["out"]["kernel"]
    params["mlp"]["down"]["kernel"] = 0 * params["mlp"]["down"]["kernel"]
    y, cache, aux = jax.jit(lambda p: block.apply({"params": p}, x, None))(params)
    assert np.array_equal(y, x) and cache is None
    assert jax.tree.leaves(aux) == []


def test_products_of_a_memory_are_in_full_float32_beside_bfloat16():
    config = ModelConfig(d_model=D_MODEL, dtype="bfloat16", memory=MemoryConfig(d_memory=4))
    module = make_associative(config)
    x = jnp.asarray(make_normal(0, 2, 3, D_MODEL), jnp.bfloat16)
    variables = init(module, x, module.init_cache(2))

    def loss(variables, x):
        return jnp.sum(module.apply(variables, x, module.init_cache(2)).astype(jnp.float32))

    parts = sub_jaxprs(jax.make_jaxpr(jax.grad(loss, (0, 1)))(variables, x).jaxpr)
    products = [e for part in parts for e in part.eqns if e.primitive.name == "dot_general"]
    full = [e for e in products if e.invars[0].aval.dtype == jnp.float32]
    assert len(full) > 10 and len(full) < len(products)  # the projections are in bfloat16
    for equation in full:
        assert equation.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2


def test_decays_of_minimax_and_transnormer_are_two_rules():
    layer = np.arange(6)
    linear, minimax = (log_decays_by_layer("lightning", d, 6, 2) for d in ("linear", "minimax"))
    slopes = 2.0 ** (-8.0 * np.arange(1, 3) / 2)
    assert_close(linear, np.outer(1 - layer / 6, -slopes), rel_rms=1e-12)
    assert_close(minimax, np.outer(1 - layer / (5 + 1e-5) + 1e-5, -slopes), rel_rms=1e-12)
    assert abs(minimax[-1]).max() < 2e-5 < abs(linear[-1]).max()
    assert np.isfinite(log_decays_by_layer("lightning", "minimax", 1, 2)).all()


@pytest.mark.parametrize("kind", ["learned", pytest.param("gated", marks=pytest.mark.slow)])
def test_decays_of_many_heads_start_finite(kind):
    """The slowest of 1,100 heads would forget 2^-1105: their logarithm is taken in float64."""
    n_heads = 1100
    sizes = Sizes(d_model=4, n_heads=n_heads, n_kv_heads=1, d_key=2, d_value=1)
    mixer = DecayAttention(sizes, DecayConfig(kind=kind))
    x = jnp.zeros((1, 1, 4))
    params = mixer.init(jax.random.key(0), x, None, None, train=False)["params"]
    start = params["decay_rate" if kind == "learned" else "decay_bias"]
    assert start.shape == (n_heads,) and np.isfinite(start).all()
    head = np.arange(100)
    expected = np.log1p(-(2.0 ** (-5.0 - head)))
    if kind == "learned":
        found = -np.log1p(np.exp(np.float64(start[:100])))
    else:
        found = -np.log1p(np.exp(-np.float64(start[:100]))) / 16
    assert_close(found / expected, np.ones(100), rel_rms=1e-4)
