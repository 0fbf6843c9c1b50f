"""The suite of faults, a little of it; `make faults` runs it all."""

import subprocess
import sys

import pytest

from longctx_jax.benchmarking.rows import flat, read
from tests.tiny import PROJECT


def faults(*flags):
    command = [sys.executable, "-m", "scripts.faults", *flags]
    return subprocess.run(
        command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=900
    )


@pytest.mark.slow
def test_kills_damage_and_twins_lose_nothing(tmp_path):
    out = tmp_path / "faults.jsonl"
    chosen = "kills,numbers,texts,readers,duplicates"
    done = faults(f"--faults={chosen}", "--n_kills=4", f"--out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list(map(flat, read(out)))
    assert sum(row["n"] for row in rows if row["fault"] == "SIGKILL") == 4
    assert all(row["n_lost"] == 0 and row["fault"] in done.stdout for row in rows)


def test_unknown_faults_are_named():
    done = faults("--faults=kills,floods")
    assert done.returncode == 2 and "got 'floods'" in done.stderr
