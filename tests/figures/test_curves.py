"""What the figures contain, read back from their axes, and how scripts.plot fails."""

import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from longctx_jax.figures import curves
from longctx_jax.training import metrics

PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent


def make_records(n=100, offset=0.0):
    records = [
        {"step": s, "tokens": 10.0 * s, "bits_per_byte": 8 / s + offset, "tokens_per_s": 5.0}
        for s in range(1, n + 1)
    ]
    return [*records, {"step": n, "eval/bits_per_byte": 1.0 + offset}]


def test_evaluations_get_their_x_by_interpolation():
    xs, ys = curves.values(make_records(), "tokens", "eval/bits_per_byte")
    assert (xs.tolist(), ys.tolist()) == ([1000.0], [1.0])


def test_values_skips_nan_and_sorts_by_step():
    records = [{"step": 3, "loss": 1.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}]
    xs, ys = curves.values(records, "step", "loss")
    assert (xs.tolist(), ys.tolist()) == ([1.0, 3.0], [2.0, 1.0])


@pytest.mark.parametrize("window", [1, 2, 5, 99])
def test_smoothing_keeps_a_line_and_averages_noise(window):
    line = np.arange(20.0)
    np.testing.assert_allclose(curves.smooth(line, window), line, atol=1e-12)
    if window == 5:
        assert curves.smooth(np.eye(1, 9, 4)[0] * 5, 5)[4] == 1.0


def test_training_curves_show_every_run_once_in_the_legend():
    runs = {"a": make_records(), "b": make_records(offset=1.0)}
    figure = curves.draw_training_curves(runs, x="tokens")
    above, below = figure.axes
    labels = [text.get_text() for text in above.get_legend().get_texts()]
    assert labels == ["a: 1.000", "b: 2.000"]
    assert (above.get_ylabel(), below.get_ylabel()) == ("bits per byte", "speed (tokens/s)")
    assert len(below.lines) == 2 and below.get_xlabel() == "training tokens"


def test_the_first_steps_do_not_flatten_the_curve():
    figure = curves.draw_training_curves({"a": make_records()})
    assert figure.axes[0].get_ylim()[1] < 2  # the first step is at 8


def test_a_metric_nobody_recorded_names_those_there_are():
    with pytest.raises(ValueError, match="run a must record foo or eval/foo.*bits_per_byte"):
        curves.draw_training_curves({"a": make_records()}, y="foo")


def test_sweep_draws_a_line_a_combination_against_the_number():
    rows = [
        {"run": f"{m}{rate}", "model": m, "rate": rate, "n": 5, "y": rate + (m == "x")}
        for m in ("x", "z")
        for rate in (1e-3, 1e-2)
    ]
    (axes,) = curves.draw_sweep(rows, ["model", "rate", "n"], y="y").axes
    assert [line.get_label() for line in axes.lines] == ["model=x", "model=z"]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "rate"


def test_sweep_without_numbers_draws_bars_best_first():
    rows = [{"run": "p", "m": "p", "y": 2.0}, {"run": "q", "m": "q", "y": 1.0}]
    (axes,) = curves.draw_sweep([*rows, {"run": "r", "m": "r", "y": None}], ["m"], y="y").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "p"]
    with pytest.raises(ValueError, match="needs a finished run"):
        curves.draw_sweep([{"run": "r", "m": "r"}], ["m"], y="y")


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
