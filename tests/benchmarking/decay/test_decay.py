"""The suite `decay`: its rows, counts, errors, bounds, summaries, recorded table and figure."""

import dataclasses
import functools
import importlib.util
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.benchmarking import decay as suite
from longctx_jax.benchmarking import roofline, timing
from longctx_jax.benchmarking.decay import cases, floors, forms, peers, summary
from longctx_jax.benchmarking.decay.panels import panels
from longctx_jax.benchmarking.rows import flat
from longctx_jax.benchmarking.timing import Limits
from longctx_jax.figures.panels import draw_groups
from longctx_jax.ops.decay import decay_attention, select, table
from longctx_jax.ops.decay.facts import Facts

FACTS = Facts("cpu", "cpu", "float32", 1, 32, 2, 16, 16, for_training=False)
H200 = Facts("gpu", "NVIDIA H200", "bfloat16", 8, 2048, 32, 64, 64, for_training=False)
ABOUT = {"platform": "cpu", "device": "test device", "date": "d", "revision": "r", "command": "c"}
ABOUT |= {"jax_version": "j", "jaxlib_version": "l"}


def make_row(name, ms, seq=128, pass_name="forward", part="main", **fields):
    row = {"suite": "decay", "part": part, "pass": pass_name, "name": name, "median_ms": ms}
    row |= forms.shape_fields(dataclasses.replace(FACTS, seq=seq))
    times = {"quartile_1_ms": ms, "quartile_3_ms": 2 * ms, "min_ms": ms / 2}
    return row | times | {"device": "cpu", "max_error": 1e-6} | fields


@pytest.mark.slow
def test_every_form_has_a_complete_row_or_a_reason():
    limits = Limits(n_runs=1, n_warmup=0, is_quick=True, lengths=(16,))
    rows = [flat(r) for r in forms.decay_rows(limits, ("main", "per_token"), with_peers=True)]
    names = {i.name for i in select.IMPLEMENTATIONS}
    for part, name in itertools.product(("main", "per_token"), forms.PASSES):
        here = [row for row in rows if row["part"] == part and row.get("pass") == name]
        wanted = names | (set(forms.SOFTMAX_FORMS) if part == "main" else set())
        assert {row["name"] for row in here} == wanted
        assert sum(row.get("is_auto", False) for row in here) == 1
    timed = [row for row in rows if "median_ms" in row and row["part"] != "peers"]
    assert len(timed) > 30
    for row in timed:
        assert row["median_ms"] > 0 and row["compile_s"] > 0 and row["peak_bytes"] > 0
        assert row["tokens_per_s"] > 0 and row["roofline_fraction"] > 0 and row["floor_ms"] > 0
        assert (row["ceiling_source"], row["n_inner"]) == ("measured", 1)
        assert 0 < row["rel_rms_error"] < 2e-6 and row["max_error"] < 2e-5, row["name"]
        assert (row["batch_size"], row["seq_len"], row["n_heads"]) == (1, 16, 2)
    skipped = [row for row in rows if "median_ms" not in row and row["part"] != "summary"]
    assert all(row["skipped"] for row in skipped if "speed_ratio" not in row)
    cudnn = [row for row in skipped if row["name"] == "softmax cudnn"]
    assert len(cudnn) == 2 and "needs a GPU" in cudnn[0]["skipped"]
    json.dumps(rows, allow_nan=False)


def test_parts_without_shapes_say_so():
    rows = [flat(r) for r in forms.decay_rows(Limits(is_quick=True), ("grid", "long"))]
    assert [row["name"] for row in rows] == ["grid", "long"]
    assert all("no shapes of this part" in row["skipped"] for row in rows)


@pytest.mark.parametrize(
    "width, n_bytes, n_flops", [(64, 512, 32_768), (128, 1024, 98_304)], ids=str
)
def test_forward_counts_per_token_and_head(width, n_bytes, n_flops):
    facts = dataclasses.replace(H200, d_key=width, d_value=width)
    n = facts.batch * facts.seq * facts.heads
    assert floors.ideal_bytes(facts) == n * n_bytes
    assert floors.ideal_flops(facts) == n * n_flops
    both = dataclasses.replace(facts, for_training=True)
    assert floors.ideal_bytes(both) == n * (8 + 14) * width
    backward = 10 * 64 * width + 10 * width**2
    assert floors.ideal_flops(both) == n * (n_flops + backward)
    gated = dataclasses.replace(both, is_per_token=True)
    assert floors.ideal_bytes(gated) == n * (22 * width + 12)  # in, in again, gradient


def test_floor_is_the_larger_of_bytes_and_flops():
    n_flops = floors.ideal_flops(H200)
    top = roofline.ceiling("NVIDIA H200", "bfloat16")
    row = floors.roofline_fields(H200, 0.125, top, n_flops)
    assert row["floor_ms"] == pytest.approx(0.0625, rel=0.01)  # 8 x 2048 x 32 x 512 B at 4.3 TB/s
    assert row["roofline_fraction"] == pytest.approx(0.5, rel=0.01)
    assert row["tb_per_s"] == pytest.approx(4.3 / 2, rel=0.01)
    assert row["ceiling_source"] == "table"
    slow = roofline.Ceiling(4.3e12, 1e12, "table")
    row = floors.roofline_fields(H200, 1.0, slow, n_flops)
    assert row["floor_ms"] == pytest.approx(1e3 * n_flops / 1e12)
    pairs = dataclasses.replace(H200, batch=1, heads=1, seq=3)
    assert floors.softmax_ideal_flops(pairs) == 6 * 4 * 64


def test_a_wrong_form_shows_in_its_error(monkeypatch):
    inputs = cases.make_inputs(dataclasses.replace(FACTS, seq=8, for_training=True), 1)
    reference = inputs.reference()
    assert len(reference) == 4  # out, dq, dk, dv
    fields = cases.error_fields(reference, reference)
    assert fields == {"max_error": 0.0, "rel_rms_error": 0.0}
    wrong = [*reference[:3], reference[3] * 1.01]
    assert cases.error_fields(wrong, reference)["rel_rms_error"] == pytest.approx(0.01)
    off = reference[0].copy()
    off[0, -1, 0, 0] += 3 * np.sqrt(np.mean(off**2))
    off = [off, *reference[1:]]
    assert cases.error_fields(off, reference)["max_error"] == pytest.approx(3.0)
    lost = [np.where(np.arange(2)[:, None] == 0, np.nan, reference[0]), *reference[1:]]
    fields = cases.error_fields(lost, reference)
    assert fields["max_error"] is None and fields["non_finite_fraction"] == 0.5
    assert inputs.reference() is reference  # once a shape, not once a form
    other = inputs.reference(log_decay=(-1.0, -1.0))
    assert not np.allclose(other[0], reference[0])


def test_errors_of_long_sequences_come_from_their_first_tokens(monkeypatch):
    monkeypatch.setattr(cases, "ERROR_TOKENS", 16)
    facts = dataclasses.replace(FACTS, for_training=True)
    inputs = cases.make_inputs(facts, 1)
    assert [x.shape for x in inputs.reference()] == [(1, 16, 2, 16)] * 2  # no gradient of keys
    case = cases.make_case("two_pass", inputs)
    arguments = case.make_inputs(None)
    assert case.inspect is not None
    assert case.inspect(arguments, case.function(*arguments))["max_error"] < 1e-5


def test_calls_of_one_run_are_the_same_as_calls_alone():
    inputs = cases.make_inputs(FACTS, 4)
    assert len({float(jnp.sum(x[0])) for x in inputs.sets}) == 4
    one = functools.partial(cases.one_call, cases.form("chunked"), FACTS)
    results = jax.jit(functools.partial(cases.chain, one))(*inputs.sets)
    for (out,), arrays in zip(results, inputs.sets, strict=True):
        expected = decay_attention(*arrays, implementation="chunked")[0]
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_short_calls_share_a_run_on_a_gpu_only(monkeypatch):
    tiny = dataclasses.replace(H200, batch=1, seq=128, heads=16)
    assert cases.inner_calls("two_pass", dataclasses.replace(tiny, platform="cpu")) == 1
    assert cases.inner_calls("pallas_triton", tiny) == cases.MAX_INNER
    assert cases.inner_calls("recurrent", tiny) == 1
    monkeypatch.setattr(cases, "inner_calls", lambda name, facts: 2)
    inputs = cases.make_inputs(FACTS, 3)
    case = cases.make_case("quadratic", inputs)
    assert case.n_inner == 2 and case.make_inputs(None)[1] is inputs.sets[1]
    assert case.make_inputs(None)[0] is inputs.sets[2]  # the next run starts where this one ended
    case = cases.make_case("quadratic", inputs)
    row = timing.measure_in_turns({"": case}, n_runs=1, n_warmup=0)[""][0]
    assert row["n_inner"] == 2 and row["max_error"] < 1e-5


def test_slow_forms_are_bounded_by_name_and_by_prediction():
    limits = Limits()
    every = forms.skip_reasons(dataclasses.replace(H200, seq=131_072), limits, shows_all=True)
    assert "up to 16384 tokens" in every["quadratic"] and "up to 8192" in every["recurrent"]
    assert "predicted" in every["softmax blockwise"] and every["two_pass"] == ""
    short = dataclasses.replace(H200, seq=2048)
    assert forms.skip_reasons(short, limits, shows_all=True)["fleet"] == ""
    assert "times the best" in forms.skip_reasons(short, limits, shows_all=False)["fleet"]


def test_shapes_of_a_gpu_and_of_a_cpu():
    gpu = forms.shapes("gpu", Limits())
    sizes = {(s.batch, s.heads, s.width) for s in gpu if s.part in ("main", "grid")}
    assert len(sizes) == 8 and {s.dtype for s in gpu if s.part == "float32"} == {"float32"}
    assert [s.seq for s in gpu if s.part == "long"] == [forms.LONG]
    chosen = forms.shapes("gpu", Limits(lengths=(512,)))
    assert {s.seq for s in chosen} == {512} and len({s.part for s in chosen}) == 4
    cpu = forms.shapes("cpu", Limits())
    assert {s.part for s in cpu} == {"main", "per_token"} and max(s.seq for s in cpu) == 8192


def test_timing_divides_and_drops_and_skips():
    seen = []

    def make_inputs(last):
        seen.append(last)
        return (jnp.ones(4),)

    def broken(x):
        raise NotImplementedError("never\nmind")

    twice = timing.Case(jax.jit(lambda x: x + 1), make_inputs, 2, False, lambda a, o: {"e": 7})
    cases = {"twice": twice, "broken": timing.Case(jax.jit(broken), make_inputs)}
    rows = timing.measure_in_turns(cases, n_runs=2, may_fail=(NotImplementedError,))
    assert rows["broken"][0] == {"skipped": "never"} and rows["broken"][1].size == 0
    assert rows["twice"][0]["e"] == 7 and seen == [None] * len(seen)
    row = timing.measure_in_turns({"twice": twice}, n_runs=1, max_bytes=8)["twice"][0]
    assert "more than 8" in row["skipped"]
    with pytest.raises(NotImplementedError):
        timing.measure_in_turns(cases, n_runs=1)


def test_runs_of_several_calls_are_divided(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(
        timing.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 1) or now[0]
    )
    case = timing.Case(jax.jit(lambda x: x), lambda _: (jnp.ones(1),), n_inner=4)
    assert timing.measure_in_turns({"": case}, n_runs=1)[""][0]["median_ms"] == 250.0


def test_crossover_is_the_first_length_that_wins():
    rows = []
    for seq, decay, softmax in ((128, 3.0, 1.0), (512, 2.0, 2.5), (2048, 4.0, 30.0)):
        rows += [make_row("two_pass", decay, seq), make_row("recurrent", 9 * decay, seq)]
        rows += [make_row("softmax dense", 2 * softmax, seq), make_row("softmax x", softmax, seq)]
        rows += [make_row("fla chunk_retention", 1e-3, seq, part="peers")]
    rows += [make_row("two_pass", 1e-3, 8192), {"name": "softmax x", "skipped": "too long"}]
    (row,) = map(flat, summary.crossover_rows(rows))
    assert (row["seq_len"], row["form"], row["softmax_form"]) == (512, "two_pass", "softmax x")
    assert row["speed_up_at_longest"] == 7.5
    assert "two_pass beats softmax x from 512 tokens" in summary.crossover_text(row)
    (row,) = map(flat, summary.crossover_rows(rows[:5]))
    assert row["seq_len"] is None and "up to 128 tokens" in summary.crossover_text(row)


def test_ratios_compare_equal_shapes():
    rows = [make_row("two_pass", 2.0, is_auto=True), make_row("chunked", 1.0)]
    rows += [make_row("chunked", 0.1, pass_name="forward_backward"), make_row("chunked", 0.1, 512)]
    rows += [make_row("leet recursion", 6.0, part="peers", max_error=None)]
    best, auto = map(flat, summary.ratio_rows(rows))
    assert best["name"] == "ratio best / leet recursion" and best["form"] == "chunked"
    assert (best["speed_ratio"], auto["speed_ratio"]) == (6.0, 3.0)
    assert (best["speed_ratio_quartile_1"], best["speed_ratio_quartile_3"]) == (3.0, 12.0)
    assert best["peer_is_not_finite"] and best["part"] == "peers"
    assert "128 tokens" in suite.SUITE.summary(best)


def test_recorded_table_decides(tmp_path, monkeypatch):
    path_of = functools.partial(table.table_path, folder=tmp_path)
    monkeypatch.setattr(table, "table_path", lambda device, folder=None: path_of(device))
    rows = [make_row("prefix", 1.0, 512), make_row("recurrent", 0.5, 512)]
    rows += [make_row("prefix", 2.0, 512, "forward_backward")]
    others = {i.name for i in select.IMPLEMENTATIONS} - {"prefix", "recurrent"}
    both = ("forward", "forward_backward")
    slow = [make_row(name, 50.0, 512, which) for name in others for which in both]
    rows += slow + [make_row("recurrent", 50.0, 512, "forward_backward")]
    rows += [
        make_row("fla chunk_retention", 0.1, 512, part="peers"),
        make_row("softmax x", 0.1, 512),
    ]
    path, wrong = summary.record(rows, ABOUT)
    assert path.parent == tmp_path and wrong == []
    facts = dataclasses.replace(FACTS, device="test device", seq=600)
    row = table.nearest_row(facts, table.load_table("test device"))
    assert row["forward_ms"]["prefix"] == 1.0 and row["forward_ms"]["recurrent"] == 0.5
    assert row["training_ms"]["prefix"] == 2.0 and row["heads"] == FACTS.heads
    assert not any(name.startswith(("fla ", "softmax")) for name in row["forward_ms"])
    assert select.explain_facts(facts).chosen == "recurrent"
    assert select.explain_facts(dataclasses.replace(facts, for_training=True)).chosen == "prefix"
    # A second recording is seen at once.
    fast = make_row("fleet", 0.1, 512)
    summary.record([r for r in rows if r["name"] != "fleet"] + [fast], ABOUT)
    assert select.explain_facts(facts).chosen == "fleet"
    recorded = summary.table_rows(rows)
    (line,) = summary.wrong_choices(recorded, "cpu", "test device")[:1]
    assert "auto takes fleet" in line and "recurrent took 0.5" in line
    with pytest.raises(ValueError, match="measure a part first"):
        summary.record([make_row("softmax x", 1.0)], ABOUT)
    table.load_table.cache_clear()


def test_absent_peers_are_rows_too(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    inputs = cases.make_inputs(FACTS, 1)
    rows = dict(peers.peer_rows(inputs, Limits()))
    assert rows.keys() == {peer.name for peer in peers.PEERS}
    assert all("not installed: torch" in row["skipped"] for row in rows.values())


def test_what_peers_cannot_do_and_how_they_fail(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    known = {peer.name: peer for peer in peers.PEERS}
    inputs = cases.make_inputs(dataclasses.replace(FACTS, for_training=True), 1)
    assert "no backward" in peers.unsupported(known["leet recursion"], inputs)
    assert "needs a GPU" in peers.unsupported(known["fla chunk_retention"], inputs)
    gated = cases.make_inputs(dataclasses.replace(FACTS, is_per_token=True), 1)
    assert "constant" in peers.unsupported(known["leet vanilla"], gated)

    def fail(peer, inputs, limits):
        raise KeyError("/home/someone/lib/gpu.so: no GPU")

    monkeypatch.setattr(peers, "_measure", fail)
    rows = dict(peers.peer_rows(inputs, Limits()))
    assert rows["leet vanilla"]["skipped"].endswith("gpu.so: no GPU'")
    assert "someone" not in rows["leet vanilla"]["skipped"]
    retnet = peers.own_log_decay(known["fla chunk_retention"], 4)
    lightning = peers.own_log_decay(known["fla chunk_lightning_attn"], 4)
    assert retnet is None and lightning == (0.0, -2.0, -4.0, -6.0)


def test_figure_has_a_panel_a_question_and_one_legend():
    fields = {"roofline_fraction": 0.5, "peak_bytes": 1000, "tokens_per_s": 1.0}
    names = {i.name for i in select.IMPLEMENTATIONS}
    rows = []
    for seq, name in itertools.product((32, 64), forms.PASSES):
        ours = [*sorted(names), "softmax dense"]
        rows += [make_row(form, 1.0 + seq, seq, name, **fields) for form in ours]
        rows += [make_row("fla chunk_x", 0.5, seq, name, part="peers")]
        rows += [make_row("two_pass", 9.0, seq, name, is_per_token=True)]
    rows += [make_row("two_pass", 9.0, 128, d_key=8), {**rows[0], "n_heads": 3}]
    rows += [{**rows[0], "name": "softmax cudnn", "skipped": "no GPU"}]
    del rows[-1]["median_ms"]
    figure = draw_groups(panels(rows), rows)
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["time (ms)"] * 2 + [
        "least possible time / time",
        "memory of a call",
    ]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["two_pass"].get_xdata()) == [32, 64]  # of the main shape only
    assert list(lines["two_pass"].get_ydata()) == [33.0, 65.0]
    assert names | {"softmax dense", "fla chunk_x"} <= lines.keys()
    assert lines["softmax dense"].get_linestyle() == ":"
    assert lines["fla chunk_x"].get_linestyle() == "--" and lines["two_pass"].get_linestyle() == "-"
    assert not any(axes.get_legend() for axes in figure.axes)
    (part,) = figure.subfigs
    told = [text.get_text() for text in part.legends[0].get_texts()]
    assert sorted(told) == sorted(lines)  # every form once, whatever panels it is in
