"""The suite `vq`: rows, counts, ratios, slopes, bounds, the published layers, models, figure."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.accounting import flops
from longctx_jax.benchmarking import timing, vq
from longctx_jax.benchmarking.rows import flat
from longctx_jax.benchmarking.suite import Request, checked
from longctx_jax.benchmarking.timing import Limits
from longctx_jax.benchmarking.vq import cases as vq_cases
from longctx_jax.benchmarking.vq import layers as vq_suite
from longctx_jax.benchmarking.vq import models as vq_models
from longctx_jax.benchmarking.vq import peers as vq_peers
from longctx_jax.benchmarking.vq.panels import panels
from longctx_jax.figures.panels import draw_groups
from longctx_jax.nn.contract import Call
from longctx_jax.nn.kv_cache import KVCache

TINY = vq_cases.Shape("shga", 1, 24, 32, 16, 8, 8, 8, "float32")
QUICK = Limits(n_runs=1, n_warmup=0, is_quick=True)


def parameters_and_sinusoids(shape):
    """Flops of projecting the sinusoids, once a call, which no formula counts."""
    model = shape.model
    return 2 * model.d_model * model.n_kv_heads * model.d_key * (shape.window_len + 1)


@pytest.mark.parametrize("head_type", ["shga", "mqa"])
def test_flop_formula_against_the_compiler(head_type):
    shape = vq_cases.Shape(head_type, 1, 128, 64, 32, 16, 128, 128, "float32")
    layer = vq_cases.make_layer("quadratic", shape)
    x = jax.ShapeDtypeStruct((1, shape.seq, shape.d_model), shape.dtype)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)

    def run(variables, x):
        return vq_cases.forward(layer, variables, x)[0]

    cost = jax.jit(run).lower(variables, x).compile().cost_analysis()
    per_token = flops.mixer_flops(shape.model, "vq", Call(shape.seq, pairs="dense"))
    wanted = shape.seq * per_token + parameters_and_sinusoids(shape)
    # Beside matrix products the compiler counts exponentials, norms and masks.
    assert wanted < cost["flops"] < 1.15 * wanted


def test_ideal_flops_of_a_short_sequence_are_those_of_all_pairs():
    short = dataclasses.replace(TINY, seq=8)
    for pass_name in vq_cases.PASSES:
        linear, quadratic = (
            vq_cases.ideal_flops(form, short, pass_name) for form in ("linear", "quadratic")
        )
        assert linear == quadratic
    # By hand, one token: projections, bias, search, its own key.
    one = dataclasses.replace(TINY, seq=1)
    hand = 2 * 32 * (16 + 16 + 64 + 2 * 64) + 2 * 9 * 16 + 2 * 8 * 16 + 2 * (16 + 64)
    assert vq_cases.ideal_flops("linear", one, "forward") == hand
    both = vq_cases.ideal_flops("linear", one, "forward_backward")
    assert both == 3 * hand - 2 * (2 * 8 * 16)  # the search has no backward pass


def test_ideal_flops_grow_as_they_should():
    long = [dataclasses.replace(TINY, seq=n) for n in (2**14, 2**15)]
    for form, factor in (("linear", 2.0), ("quadratic", 4.0), ("softmax blockwise", 4.0)):
        one, two = (vq_cases.ideal_flops(form, shape, "forward") for shape in long)
        assert two / one == pytest.approx(factor, rel=0.05)


def test_ideal_bytes_know_every_parameter():
    for head_type in vq.HEADS:
        shape = dataclasses.replace(TINY, head_type=head_type)
        layer = vq_cases.make_layer("linear", shape)
        x = jnp.zeros((1, 2, shape.d_model))
        params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
        matrices = sum(p.size for p in jax.tree.leaves(params) if p.ndim == 2 and p.shape[0] > 4)
        arrays = 2 * shape.seq * shape.d_model
        assert vq_cases.ideal_bytes(shape, "forward") == 4 * (matrices + arrays)


def test_slope_is_fitted_in_every_round():
    lengths = np.array([4096, 16_384, 65_536])
    rounds = np.array([1.0, 2.0, 3.0])
    times = {int(n): 1e-5 * rounds * n**1.1 for n in lengths}
    row = vq_suite.slope_fields(times)
    assert row["exponent"] == pytest.approx(1.1) and row["n_runs"] == 3
    times[65_536][2] *= 4.0
    row = vq_suite.slope_fields(times)
    assert row["exponent"] == pytest.approx(1.1) and row["exponent_quartile_3"] > 1.2
    sizes = vq_suite.setting("cpu", Limits(lengths=(64,)))
    (row,) = map(flat, vq_suite.slope_part(sizes, QUICK, ("shga",)))
    assert "two lengths: got [64]" in row["skipped"]


def test_ratios_are_of_one_round_and_leave_out_what_did_not_run():
    measured = {
        "linear": ({}, np.array([1.0, 2.0, 1.0])),
        "quadratic": ({}, np.array([3.0, 6.0, 5.0])),
        "softmax blockwise": ({"skipped": "why"}, np.zeros(0)),
    }
    (row,) = map(flat, vq_suite.ratio_rows(measured, ["linear"], {}))
    assert (row["name"], row["form"], row["n_runs"]) == ("ratio linear / quadratic", "linear", 3)
    assert (row["speed_ratio"], row["speed_ratio_quartile_3"]) == (3.0, 4.0)
    assert vq_suite.ratio_rows(measured, ["auto"], {}) == []


def test_sizes_by_platform():
    cpu, gpu = (vq_suite.setting(p, Limits()) for p in ("cpu", "gpu"))
    assert (cpu.base.d_model, cpu.base.dtype, cpu.slope_lengths[-1]) == (256, "float32", 65_536)
    assert (gpu.base.d_model, gpu.base.dtype, gpu.lengths[-1]) == (768, "bfloat16", 131_072)
    assert gpu.shape(seq=2048).batch == 8 and gpu.shape(seq=131_072).batch == 1
    assert gpu.shape(seq=2048, head_type="mqa").model.n_kv_heads == 1
    assert vq_suite.setting("gpu", Limits(lengths=(512,))).lengths == (512,)
    model = cpu.shape(seq=1024).model
    assert (model.n_heads, model.d_value, model.of("vq").gate) == (1, 512, "silu")
    model = gpu.shape(seq=1024, head_type="mha").model
    assert (model.n_heads, model.n_kv_heads, model.d_value, model.of("vq").gate) == (
        6,
        6,
        128,
        "none",
    )


def test_quadratic_forms_are_bounded_and_linear_ones_are_not():
    long = dataclasses.replace(vq_suite.setting("cpu", Limits()).base, seq=131_072)
    for form in ("quadratic", "softmax blockwise"):
        assert "predicted" in vq_suite.too_slow(form, long, "forward", "cpu", Limits())
        assert not vq_suite.too_slow(form, long, "forward", "cpu", QUICK)
        assert vq_suite.is_slow(form, long, "forward", Limits())
    assert not vq_suite.too_slow("linear", long, "forward", "cpu", Limits())
    assert not vq_suite.is_slow("linear", long, "forward", Limits())


def measure(*parts, **options):
    """The flat rows of parts, as scripts.benchmark asks for them."""
    request = checked({"vq": vq.SUITE}, "vq", Request(None, QUICK, parts, options=options))
    return list(map(flat, vq.SUITE.rows(request)))


def fake_measure(cases, limits, most_runs):
    del limits, most_runs
    row = {"median_ms": 2.0, "peak_bytes": 7, "compile_s": 0.1, "n_runs": 2}
    times = np.array([2e-3, 2e-3])
    return {name: (dict(row), times * (1 + i)) for i, name in enumerate(cases)}


def test_layer_has_a_row_a_form_or_a_reason(monkeypatch):
    monkeypatch.setattr(vq_suite, "measure", fake_measure)
    checkout = vq_peers.Checkout("legacy", "r", {}, "", "not installed: chex")
    monkeypatch.setattr(vq_peers, "load", lambda folder: checkout)
    rows = measure("layer", heads=["mqa"], peers=["a/folder"])
    for pass_name in vq_cases.PASSES:
        here = {row["name"]: row for row in rows if row.get("pass") == pass_name}
        assert here.keys() >= {"linear", "quadratic", "softmax blockwise", "softmax cudnn"}
        assert "needs a GPU" in here["softmax cudnn"]["skipped"]
        assert "a GPU kernel" in here["pallas_triton"]["skipped"]
        assert "auto" not in here  # off a GPU it is linear
        assert here["linear"]["roofline_fraction"] > 0 and here["linear"]["tokens_per_s"] == 24_000
        assert here["ratio linear / quadratic"]["speed_ratio"] == 2.0
        assert here["ratio linear / quadratic"]["seq_len"] == 48
    legacy = [row for row in rows if row["name"].startswith("published")]
    assert {row["skipped"] for row in legacy} == {"not installed: chex"} and len(legacy) == 2
    assert all(row["part"] == "layer" for row in rows)
    json.dumps(rows, allow_nan=False)


def test_slow_forms_take_turns_with_ours_alone(monkeypatch):
    groups = []

    def record(cases, limits, most_runs):
        groups.append((list(cases), most_runs))
        return fake_measure(cases, limits, most_runs)

    monkeypatch.setattr(vq_suite, "measure", record)
    monkeypatch.setattr(vq_suite, "is_slow", lambda form, *_: form == "quadratic")
    rows = measure("layer", heads=["mqa"])
    assert groups[0] == (["linear", "softmax blockwise"], 1)
    assert groups[1] == (["linear", "quadratic"], vq_suite.SLOW_RUNS)
    names = [row["name"] for row in rows if row["pass"] == "forward" and "skipped" not in row]
    assert names.count("linear") == 1 and "ratio linear / quadratic" in names


def test_variants_are_compared_with_one_of_them(monkeypatch):
    monkeypatch.setattr(vq_suite, "measure", fake_measure)
    rows = measure("codes", "blocks", "reductions")
    codes = [r for r in rows if r["part"] == "codes" and r["pass"] == "forward"]
    assert [row["n_codes"] for row in codes] == [4, 8]
    assert [row["relative_time"] for row in codes] == [0.5, 1.0] and codes[0]["relative_to"] == 8
    reductions = [r["reduction"] for r in rows if r["part"] == "reductions"]
    assert reductions == 2 * ["serial", "matmul", "associative"]
    assert {r["block_len"] for r in rows if r["part"] == "blocks"} == {8, 16}


LEGACY = """
import flax.linen as nn
import jax
import jax.numpy as jnp

class VQAttention(nn.Module):
    config: object

    @staticmethod
    def initial_state(config, batch_size):
        return jnp.zeros((batch_size, config.mem_len))

    @nn.compact
    def __call__(self, state, input_dict):
        x = input_dict["input_features"]
        scale = self.param("u", nn.initializers.zeros, (self.config.d_k,))
        x = jnp.clip(x, a_min=-3.0) * (1.0 + scale.sum())
        assert input_dict["vq_spec"]["loss_mask"].shape == x.shape[:2]
        return state + 1, {"res": x, "l_commit": x.mean(), "l_codebook": x.mean()}
"""
OPTIMIZED = """
import flax.linen as nn
import jax
import jax.numpy as jnp

class Attention(nn.Module):
    config: object

    pre_reshape = staticmethod(lambda x, config: x)
    post_reshape = staticmethod(lambda x, config: x)

    @nn.compact
    def __call__(self, x):
        if self.config.reduction_type == "matmul":
            raise KeyError("/home/someone/thing.py: broken")
        x = jnp.tile(x, 2)  # as wide as the values
        x = nn.Dense(self.config.d_model, use_bias=False, name="res_proj")(x)
        return {"res": x, "l_commit": x.mean(), "l_codebook": x.mean()}

class Scanned(Attention):
    @nn.compact
    def __call__(self, x):
        return Attention(self.config)(x)

def get_attn_cls(kind):
    return Scanned if kind == "vq_old" else Attention
"""
TYPES = """
class TransformerConfig:
    @classmethod
    def create(cls, **fields):
        config = cls()
        config.__dict__.update(fields)
        return config
"""
SPEC = """
class VQSpec:
    create = staticmethod(dict)
"""


def make_checkout(folder, branch):
    package = folder / "src" / "transformer_vq" / "nn"
    package.mkdir(parents=True)
    for place in (package.parent, package):
        (place / "__init__.py").write_text("")
    name, text = {"legacy": ("attn", LEGACY), "optimized": ("attn2", OPTIMIZED)}[branch]
    for file, content in ((name, text), ("types", TYPES), ("vq", SPEC)):
        (package / f"{file}.py").write_text(content)
    return vq_peers.load(folder)


@pytest.mark.slow
def test_checkouts_of_both_branches_run_in_one_process(tmp_path):
    legacy = make_checkout(tmp_path / "a", "legacy")
    optimized = make_checkout(tmp_path / "b", "optimized")
    assert (legacy.branch, optimized.branch) == ("legacy", "optimized")
    assert legacy.notes == f"shims: {vq_peers.CLIP_SHIM}" and legacy.reason == ""
    with pytest.raises(TypeError):
        jnp.clip(jnp.ones(1), a_min=0.0)  # the shim is in the stand-in's namespace alone
    inputs = vq_cases.make_inputs(TINY)
    inputs.cache["linear"] = jax.eval_shape(
        vq_cases.make_layer("linear", TINY).init, jax.random.key(0), inputs.sets[0][0]
    )
    inputs.cache["linear"] = jax.tree.map(lambda x: jnp.ones(x.shape), inputs.cache["linear"])
    cases = {}
    for checkout in (legacy, optimized):
        for peer in checkout.peers()[:2]:  # of the second, one in a scope of its own
            cases[peer.name] = vq_peers.make_case(checkout, peer, inputs, "forward_backward")
    broken = next(peer for peer in optimized.peers() if peer.reduction == "matmul")
    cases[broken.name] = vq_peers.make_case(optimized, broken, inputs, "forward_backward")
    options = {"n_runs": 1, "n_warmup": 0, "may_fail": (vq_peers.PeerError,)}
    measured = timing.measure_in_turns(cases, **options)
    rows = {name: row for name, (row, _) in measured.items()}
    skipped = rows.pop(broken.name)["skipped"]
    assert skipped.startswith("KeyError") and "thing.py: broken" in skipped
    assert "someone" not in skipped
    assert len(rows) == 4 and all(row.get("median_ms", 0) > 0 for row in rows.values()), rows
    # 17 = 1 + the sum of 16 weights that were copied; clipped at -3.
    case = vq_peers.make_case(legacy, legacy.peers()[0], inputs, "forward")
    params, x = case.make_inputs(None)
    assert x.shape == (3, 1, 8, 32)  # blocks first
    out = case.function(params, x)[0]
    np.testing.assert_allclose(out, 17.0 * np.maximum(x, -3.0), rtol=1e-6)


def test_our_weights_under_their_names():
    for head_type in vq.HEADS:
        shape = dataclasses.replace(TINY, head_type=head_type)
        x = jnp.zeros((1, 2, shape.d_model))
        ours = jax.eval_shape(vq_cases.make_layer("linear", shape).init, jax.random.key(0), x)
        ours = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), ours)
        theirs = vq_peers.optimized_weights(ours, shape)
        n_ours = sum(x.size for x in jax.tree.leaves(ours)) - shape.d_model  # but for the norm's
        assert sum(x.size for x in jax.tree.leaves(theirs)) == n_ours
        if head_type == "shga":
            theirs = vq_peers.legacy_weights(ours, shape)
            n_theirs = sum(x.size for x in jax.tree.leaves(theirs))
            assert n_theirs == n_ours + 2 * shape.d_model
            assert theirs["kvg_proj"]["kernel"].shape == (32, 16 + 64 + 64)


def test_what_is_no_checkout_and_what_cannot_be_imported(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="src/transformer_vq/nn/attn.py or attn2.py: got .*empty"):
        vq_peers.load(tmp_path / "empty")
    monkeypatch.setitem(globals(), "LEGACY", "import a_package_that_is_not_there")
    missing = make_checkout(tmp_path / "a", "legacy")
    assert missing.reason == "not installed: a_package_that_is_not_there"
    monkeypatch.setitem(globals(), "LEGACY", "raise RuntimeError('/home/someone/x.so is old')")
    assert make_checkout(tmp_path / "b", "legacy").reason == "RuntimeError: x.so is old"


def test_what_the_published_layers_cannot_do():
    peers = {peer.name: peer for peer in vq_peers.PEERS}
    scan, serial = peers["published legacy scan"], peers["published optimized serial"]
    assert vq_peers.unsupported(scan, TINY) == "" == vq_peers.unsupported(serial, TINY)
    changed = {
        "shga only": (scan, {"head_type": "mqa"}),
        "whole blocks": (scan, {"seq": 25}),
        "three blocks": (serial, {"seq": 16}),
    }
    for text, (peer, fields) in changed.items():
        assert text in vq_peers.unsupported(peer, dataclasses.replace(TINY, **fields))


@pytest.mark.slow
def test_state_of_a_long_context_is_made_up_and_constant():
    size = vq_models.sizes("cpu", QUICK)
    model = vq_models.make_model(size, "shga", "auto")
    sizes = set()
    for context_len in (1000, 1_000_000):
        cache = vq_models.made_up_cache(model, context_len, 4)
        sizes.add(sum(x.size for x in jax.tree.leaves(cache)))
    assert len(sizes) == 1
    (layer,) = vq_models.made_up_cache(model, 1_000_000, 4).layers
    assert int(layer.position[0, 0]) == 1_000_000
    assert int(layer.table.count[0, 0, 0].sum()) == 1_000_000 - 16
    assert int(layer.documents.min()) == 0
    (layer,) = vq_models.made_up_cache(model, 5, 4).layers
    assert int(layer.table.count.sum()) == 0
    assert (layer.documents >= 0).sum(-1).tolist() == [[5], [5]]  # two units
    full = vq_models.make_model(size, "mqa", vq_models.BASELINE)
    (layer,) = vq_models.made_up_cache(full, 5, 4).layers
    assert isinstance(layer, KVCache)
    assert layer.slot_positions[0, 0].tolist() == [0, 1, 2, 3, 4, -1, -1, -1, -1]


def test_models_are_those_of_the_paper_on_a_gpu():
    size = vq_models.sizes("gpu", Limits())
    gated, full = (vq_models.make_model(size, "shga", f).config for f in ("auto", "transformer"))
    assert (gated.n_layers, gated.mlp, gated.d_value, gated.of("vq").codebook_size) == (
        48,
        "none",
        1536,
        512,
    )
    assert (full.n_layers, full.pattern, full.n_heads) == (24, ("softmax",), 6)
    one = vq_models.make_model(size, "mqa", "quadratic").config
    assert (one.n_kv_heads, one.d_ff, one.of("vq").implementation) == (1, 5 * 768, "quadratic")
    assert vq_models.sizes("cpu", Limits(lengths=(64,))).lengths == (64,)


def test_caches_that_do_not_fit_say_so(monkeypatch):
    monkeypatch.setattr(timing, "device_bytes", lambda: 40_000)
    monkeypatch.setattr(Limits, "measure", lambda self, cases: fake_measure(cases, self, 1))
    limits = dataclasses.replace(QUICK, lengths=(32, 4096))
    rows = {
        (row["name"], row["context_len"]): row
        for row in map(flat, vq_models.decode_rows(limits, ("mqa",)))
    }
    assert "three of them over 40,000" in rows["transformer mqa", 4096]["skipped"]
    for context_len in (32, 4096):
        assert rows["mqa", context_len]["token_ms"] == 0.5
    assert rows["mqa", 32]["cache_bytes"] == rows["mqa", 4096]["cache_bytes"]


def layer_row(name, head_type, seq, **fields):
    row = {"suite": "vq", "part": "layer", "pass": "forward_backward", "name": name}
    row |= dataclasses.replace(TINY, head_type=head_type, seq=seq).fields()
    return row | {"device": "cpu"} | fields


def test_figure_has_a_panel_a_question():
    speed = {"median_ms": 1.0, "tokens_per_s": 5.0, "peak_bytes": 9}
    rows = []
    for seq in (1024, 4096):
        for head in vq.HEADS:
            rows += [layer_row(n, head, seq, **speed) for n in ("linear", "quadratic")]
            ratio = {"form": "linear", "other": "quadratic", "speed_ratio": 2.0}
            rows.append(layer_row("ratio linear / quadratic", head, seq, **ratio))
        rows.append(layer_row("published legacy scan", "shga", seq, **speed))
        rows.append(layer_row("softmax cudnn", "shga", seq, skipped="no GPU"))
    rows += [layer_row("linear", "shga", 64, part="codes", **speed, n_codes=n) for n in (4, 8)]
    for row in rows[-2:]:
        row["relative_time"] = 1.5
    decode = {"pass": "loop", "part": "decode", "token_ms": 1.0, "cache_bytes": 5}
    rows += [layer_row("shga", "shga", 9, context_len=n, **decode) for n in (9, 99)]
    figure = draw_groups(panels(rows), rows)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "speed",
        "memory",
        "ratio",
        "forward and backward",
        "by codes",
        "a token",
        "the state",
    ]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert len(lines) == 6 and list(lines["mha, linear"].get_xdata()) == [1024, 4096]
    assert lines["mha, linear"].get_color() == lines["mha, quadratic"].get_color()
    assert {line.get_label() for line in figure.axes[3].lines} == {"linear", "legacy scan"}
    drawn = draw_groups(panels(rows[-2:]), rows[-2:])
    assert [axes.get_title() for axes in drawn.axes] == ["a token", "the state"]


@pytest.mark.slow
def test_all_parts_run(tmp_path):
    rows = measure("layer", "slope", "reductions", "search", "decode")
    timed = [row for row in rows if "median_ms" in row]
    assert {row["part"] for row in timed} == {"layer", "slope", "reductions", "search", "decode"}
    for row in timed:
        assert row["median_ms"] > 0 and row["tokens_per_s"] > 0 and row["peak_bytes"] > 0
    same = [row["rel_rms_to_linear"] for row in timed if "rel_rms_to_linear" in row]
    assert len(same) == 3 and max(same) < 1e-5  # quadratic, a head type each
    assert sum("exponent" in row for row in rows) == 3
    json.dumps(rows, allow_nan=False)
