"""What the figures contain, read back from their axes, and how scripts.plot fails."""

import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from longctx_jax.benchmarking import plots
from longctx_jax.training import metrics

PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent


def make_records(n=100, offset=0.0):
    records = [
        {"step": s, "tokens": 10.0 * s, "bits_per_byte": 8 / s + offset, "tokens_per_s": 5.0}
        for s in range(1, n + 1)
    ]
    return [*records, {"step": n, "eval/bits_per_byte": 1.0 + offset}]


def test_evaluations_get_their_x_by_interpolation():
    xs, ys = plots.values(make_records(), "tokens", "eval/bits_per_byte")
    assert (xs.tolist(), ys.tolist()) == ([1000.0], [1.0])


def test_values_skips_nan_and_sorts_by_step():
    records = [{"step": 3, "loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}]
    xs, ys = plots.values(records, "step", "loss")
    assert (xs.tolist(), ys.tolist()) == ([1.0, 3.0], [2.0, 1.0])


@pytest.mark.parametrize("window", [1, 2, 5, 99])
def test_smoothing_keeps_a_line_and_averages_noise(window):
    line = np.arange(20.0)
    np.testing.assert_allclose(plots.smooth(line, window), line, atol=1e-12)
    if window == 5:
        assert plots.smooth(np.eye(1, 9, 4)[0] * 5, 5)[4] == 1.0


def test_training_curves_show_every_run_once_in_the_legend():
    runs = {"a": make_records(), "b": make_records(offset=1.0)}
    figure = plots.draw_training_curves(runs, x="tokens")
    above, below = figure.axes
    labels = [text.get_text() for text in above.get_legend().get_texts()]
    assert labels == ["a: 1.000", "b: 2.000"]
    assert (above.get_ylabel(), below.get_ylabel()) == ("bits per byte", "speed (tokens/s)")
    assert len(below.lines) == 2 and below.get_xlabel() == "training tokens"


def test_the_first_steps_do_not_flatten_the_curve():
    figure = plots.draw_training_curves({"a": make_records()})
    assert figure.axes[0].get_ylim()[1] < 2  # the first step is at 8


def test_a_metric_nobody_recorded_names_those_there_are():
    with pytest.raises(ValueError, match="run a must record foo or eval/foo.*bits_per_byte"):
        plots.draw_training_curves({"a": make_records()}, y="foo")


def test_sweep_draws_a_line_a_combination_against_the_number():
    rows = [
        {"run": f"{m}{rate}", "model": m, "rate": rate, "n": 5, "y": rate + (m == "x")}
        for m in ("x", "z")
        for rate in (1e-3, 1e-2)
    ]
    (axes,) = plots.draw_sweep(rows, ["model", "rate", "n"], y="y").axes
    assert [line.get_label() for line in axes.lines] == ["model=x", "model=z"]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "rate"


def test_sweep_without_numbers_draws_bars_best_first():
    rows = [{"run": "p", "m": "p", "y": 2.0}, {"run": "q", "m": "q", "y": 1.0}]
    (axes,) = plots.draw_sweep([*rows, {"run": "r", "m": "r", "y": None}], ["m"], y="y").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "p"]
    with pytest.raises(ValueError, match="needs a finished run"):
        plots.draw_sweep([{"run": "r", "m": "r"}], ["m"], y="y")


def test_context_figure_has_a_panel_a_text_and_a_line_a_model():
    def row(data, pattern, kind, length):
        return {
            "data": data,
            "pattern": pattern,
            "decay_kind": kind,
            "context_len": length,
            "bits_per_byte": 2.0 + 1 / length,
            "train_seq_len": 16,
        }

    models = [(["softmax"], ""), (["decay"], "gated"), (["decay", "softmax"], "gated")]
    rows = [row(d, *m, n) for d in ("a", "b") for m in models for n in (64, 16)]
    figure = plots.draw_context_curves(rows)
    left, right = figure.axes
    labels = [line.get_label() for line in left.lines]
    assert labels == ["softmax", "decay (gated)", "decay-softmax (gated)", "training window 16"]
    assert list(right.lines[0].get_xdata()) == [16, 64]
    with pytest.raises(ValueError, match="needs rows"):
        plots.draw_context_curves([])


def test_context_figure_tells_options_and_depths_apart_and_joins_seeds():
    def row(model, n_layers, bits, **variant):
        shared = {"data": "a", "pattern": ["softmax"], "decay_kind": "", "train_seq_len": 512}
        sizes = {"model": model, "n_layers": n_layers, "n_kv_heads": 2, "context_len": 512}
        return shared | sizes | {"variant": variant, "bits_per_byte": bits}

    rows = [row("transformer", 12, 2.0), row("transformer", 6, 2.1)]
    rows += [row("stagformer", 12, bits, n_stacks=3) for bits in (2.0, 3.0)]
    (axes,) = plots.draw_context_curves(rows).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines)[:2] == ["softmax (12 layers)", "softmax (6 layers)"]
    assert list(lines["stagformer, n_stacks=3"].get_ydata()) == [2.5]


def test_context_figure_tells_quantised_models_apart():
    def row(pattern, length, **fields):
        shared = {"data": "a", "pattern": [pattern], "decay_kind": "", "train_seq_len": 512}
        return shared | {"context_len": length, "bits_per_byte": 2.0} | fields

    def vq(size, use_table=True, gate="none"):
        return {"vq_codebook_size": size, "vq_use_table": use_table, "gate": gate}

    models = [vq(128), vq(512), vq(256, use_table=False), vq(512, gate="silu")]
    rows = [row("softmax", n) for n in (512, 8192)]
    rows += [row("vq", n, **model) for model in models for n in (512, 8192)]
    (axes,) = plots.draw_context_curves(rows).axes
    assert [line.get_label() for line in axes.lines][:-1] == [
        "softmax",
        "vq (128 codes)",
        "vq (512 codes)",
        "vq (window only)",
        "vq (512 codes, gated)",
    ]
    assert all(list(line.get_xdata()) == [512, 8192] for line in axes.lines[:-1])


def run_plot(*arguments):
    command = [sys.executable, "-m", "scripts.plot", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)


def test_script_draws_a_folder_of_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        writer = metrics.JsonLinesWriter(tmp_path / name / "metrics.jsonl")
        for record in make_records(20):
            writer.write(record.pop("step"), record)
        writer.close()
    done = run_plot(tmp_path, tmp_path / "a", f"--out={tmp_path / 'new' / 'c.png'}")
    assert done.returncode == 0, done.stderr
    assert "2 run(s)" in done.stdout  # run a was named twice
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content, text", [(None, "must hold metrics.jsonl"), ("", "is empty")])
def test_script_without_metrics_is_one_paragraph(tmp_path, content, text):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = run_plot(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and text in done.stderr
    assert "Traceback" not in done.stderr
