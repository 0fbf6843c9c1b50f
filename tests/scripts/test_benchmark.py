"""The command line of scripts.benchmark; what it measures is tested in tests/benchmarking."""

import os
import pathlib
import subprocess
import sys

import pytest

from longctx_jax.benchmarking.rows import flat, read
from tests.command_lines import run_all

PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent


def run_benchmark(*arguments, timeout=60):
    command = [sys.executable, "-m", "scripts.benchmark", *map(str, arguments)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=timeout)


ONE_PARAGRAPH = {
    (): "--suite is required",
    ("--suite=qv",): "train|decode|decay|vq",
    ("--suite=train", "--n_runs=0"): "n_runs",
    ("--suite=train", "--config=configs/nope.py"): "configs/nope.py",
}
USAGE = {
    "--suite=train --parts=modles": "models, lengths, schedules, saves",
    "--suite=decay --parts=models": "main, grid, float32, per_token, long",
    "--suite=train --lengths=1k": "numbers of tokens",
    "--suite=decode --peers=all": "belongs to --suite=decay and --suite=vq: got --suite=decode",
    "--suite=decode --record": "--record belongs to --suite=decay: got --suite=decode",
    "--suite=decay --peers=fla": "--peers must be among all in the suite decay: got fla",
    "--suite=decode --heads=mha": "--heads belongs to --suite=vq: got --suite=decode",
    "--suite=vq --parts=main": "layer, slope, codes, blocks, reductions, search, model",
    "--suite=vq --heads=gqa": "--heads must be among shga, mqa, mha in the suite vq: got gqa",
    "--suite=decay --quick --record": "leave one of them out",
    "--suite=memory --shapes=7b": "--shapes must be among 160m, 1b, 3b, 8b in the suite memory",
}
NO_CHECKOUT = ("--suite=vq", "--peers=no/such/folder")


@pytest.fixture(scope="module")
def refused():
    """What became of every command line above."""
    lines = [*ONE_PARAGRAPH, *(tuple(line.split()) for line in USAGE), NO_CHECKOUT]
    return dict(zip(lines, run_all([("benchmark", *line) for line in lines]), strict=True))


@pytest.mark.parametrize("arguments", ONE_PARAGRAPH)
def test_a_wrong_command_line_is_one_paragraph(refused, arguments):
    done = refused[arguments]
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ") and ONE_PARAGRAPH[arguments] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("line", USAGE)
def test_arguments_that_do_not_go_together_are_a_usage_error(refused, line):
    done = refused[tuple(line.split())]
    assert done.returncode == 2
    assert USAGE[line] in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_a_folder_that_is_no_checkout_is_named(refused):
    done = refused[NO_CHECKOUT]
    assert done.returncode == 1 and "got no/such/folder" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["train", "decode", "decay", "vq", "memory"])
def test_quick_run_records_complete_rows_and_a_figure(suite, tmp_path):
    out = tmp_path / "new" / "rows.jsonl"
    flags = [f"--suite={suite}", "--quick", "--n_runs=2", f"--out={out}"]
    if suite == "train":  # what the yardstick is
        flags += ["--config.model.tie_embeddings=True", "--config.optim.name=adamw"]
    done = run_benchmark(*flags, timeout=500)
    assert done.returncode == 0, done.stderr
    rows = [flat(row) for row in read(out)]
    timed = [row for row in rows if "median_ms" in row]
    assert len(timed) > 8
    for row in timed:
        assert row["suite"] == suite and row["n_runs"] == 2 and row["median_ms"] > 0
        assert row["compile_s"] > 0 and row["tokens_per_s"] > 0 and row["peak_bytes"] > 0
    for row in rows:
        assert row["is_quick"] and row["device"] and row["revision"] and row["date"]
        assert row["jax_version"] and row["command"].startswith("python -m scripts.benchmark")
        assert row["xla_flags"] == os.environ.get("XLA_FLAGS", "")
    assert ("tokens/s for tokens/s" in done.stdout) == (suite == "train")
    assert "CPU timings" in done.stdout or rows[0]["platform"] != "cpu"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
