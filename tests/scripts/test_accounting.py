"""The command line of scripts.accounting; what it computes is tested in tests/benchmarking."""

import pathlib
import subprocess
import sys

import pytest

from longctx_jax.benchmarking.rows import recorded
from tests.command_lines import run_all

PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent
MISTAKES = {
    "--schemes=mha,vqq": "--schemes must be all, or among mha, gqa, mqa",
    "--contexts=4k": "--contexts must be numbers of tokens from 1 to 2147483647: got 4k",
    "--contexts=0": "got 0",
    "--budget_gb=-1": "--budget_gb must not be negative: got -1.0",
    "--schemes=mha,mqa --baseline=gqa": "--baseline must be one of the models mha, mqa: got gqa",
    "--batch_size=0": "batch_size",
    "--compare=configs/nope.py": "the config file must exist: got configs/nope.py",
}


@pytest.fixture(scope="module")
def refused():
    lines = [("accounting", *line.split()) for line in MISTAKES]
    return dict(zip(MISTAKES, run_all(lines), strict=True))


@pytest.mark.parametrize("line", MISTAKES)
def test_a_wrong_command_line_is_one_paragraph(refused, line):
    done = refused[line]
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ") and MISTAKES[line] in " ".join(done.stderr.split())


@pytest.mark.slow
def test_models_side_by_side(tmp_path):
    out, plot = tmp_path / "rows.jsonl", tmp_path / "memory.png"
    flags = ["--schemes=decay", "--compare=configs/quickstart.py", "--contexts=256,1024"]
    flags += ["--config.model.n_layers=2", "--config.model.d_model=64", "--config.model.d_ff=64"]
    flags += ["--config.model.n_heads=2", "--budget_gb=1", f"--out={out}", f"--plot={plot}"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.accounting", *flags],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert "largest context (tokens) in 1 GiB" in done.stdout
    rows = recorded(out)
    assert {row["name"] for row in rows} == {"decay", "quickstart"}
    assert all(row["n_layers"] == 2 and row["d_model"] == 64 for row in rows)
    first = rows[0]
    assert first["cache_bytes"] == sum(first["cache_terms"].values())
    assert first["command"].startswith("python -m scripts.accounting") and first["revision"]
    assert str(tmp_path) not in out.read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_measured_programs_and_updates(tmp_path):
    out = tmp_path / "rows.jsonl"
    flags = ["--config=configs/quickstart.py", "--contexts=128", "--measure", "--train"]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.accounting", *flags, f"--out={out}"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = recorded(out)
    programs = [row for row in rows if row["part"] == "programs"]
    assert [row["program"] for row in programs] == ["prefill", "step", "loop", "train"]
    assert all(0.7 < row["peak_ratio"] < 1.4 and row["compiled"]["peak"] for row in programs)
    assert "compiled for a CPU and not run" in done.stdout or rows[0]["platform"] != "cpu"
