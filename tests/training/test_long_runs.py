"""What long runs need: one trainer a folder, a watchdog, step times, followers, other processes."""

import json
import logging
import subprocess
import sys
import time

import pytest

from longctx_jax import run_files
from longctx_jax.training import watchdog
from longctx_jax.training.processes import from_environment, several_are_meant, start_processes
from longctx_jax.training.watchdog import StepTimes, Watchdog
from longctx_jax.training.watching import steps_as_they_come
from longctx_jax.training.workdir_lock import locked
from tests.tiny import PROJECT


def test_a_folder_has_one_trainer_and_forgets_a_dead_one(tmp_path):
    program = f"""
import pathlib, time
from longctx_jax.training.workdir_lock import locked
with locked(pathlib.Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", program]
    other = subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    match = f"in use by process {other.pid} on"
    with pytest.raises(BlockingIOError, match=match), locked(tmp_path):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass


def test_a_hang_leaves_the_stacks_and_ends_the_process(tmp_path):
    program = f"""
import pathlib, time
from longctx_jax.training.watchdog import Watchdog
dog = Watchdog(pathlib.Path({str(tmp_path)!r}), 0.2, must_exit=True)
def stuck_here():
    time.sleep(30)
dog.pat()
stuck_here()
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=False, timeout=60)
    assert done.returncode == 1 and time.monotonic() - start < 25
    assert "stuck_here" in (tmp_path / run_files.HANG).read_text()


def test_a_watchdog_that_never_barked_leaves_nothing(tmp_path):
    for timeout_s in (0.0, 60.0):
        dog = Watchdog(tmp_path, timeout_s)
        dog.pat()
        dog.close()
        dog.close()
    assert not list(tmp_path.iterdir())


def test_steps_that_stand_out_are_logged(monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now)
    times = StepTimes()
    times.skip()
    with caplog.at_level(logging.WARNING, logger="absl"):
        for step, seconds in enumerate([1.0] * 20 + [9.0] + [1.0] * 3):
            now += seconds
            times.add(step, wait_s=8.5 if seconds > 1 else 0.0)
    assert [record.args[:3] for record in caplog.records] == [(20, 9.0, 8.5)]
    found = times.read()
    assert found["step_time/median_s"] == 1.0 and found["step_time/max_s"] == 9.0
    assert found["stall/data_fraction"] == pytest.approx(8.5 / 32)
    assert times.read() == {}


def test_a_follower_sees_the_newest_checkpoints_and_ends_with_the_run(tmp_path):
    results = tmp_path / "evaluations.jsonl"
    folder = tmp_path / "checkpoints"
    for name in ("2", "4", "6.orbax-checkpoint-tmp"):
        (folder / name).mkdir(parents=True)
    rows = [{"step": 2, "split": "test"}, {"step": 4, "split": "validation"}]
    results.write_text("\n".join(map(json.dumps, rows)) + "\n{torn")
    given = steps_as_they_come(tmp_path, results, 0.01, "test")
    assert next(given) == 4
    (folder / "8").mkdir()
    (tmp_path / "DONE.json").write_text("{}")
    assert list(given) == [8]
    with pytest.raises(FileNotFoundError, match="--workdir"):
        next(steps_as_they_come(tmp_path / "no", results, 0.01, "test"))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "?"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ],
    ids=str,
)
def test_whether_several_processes_are_meant(environment, expected):
    assert several_are_meant(environment) is expected


def test_processes_named_by_the_environment_or_by_flags():
    names = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert from_environment(names) == ("h:1", 2, 1)
    assert from_environment(names | {"JAX_PROCESS_ID": ""}) is None
    assert several_are_meant(names) and not several_are_meant(names | {"JAX_NUM_PROCESSES": "1"})
    with pytest.raises(ValueError, match="go together: got '', 2, -1"):
        start_processes(num_processes=2)
    with pytest.raises(ValueError, match="below --num_processes: got 2 of 2"):
        start_processes(coordinator_address="h:1", num_processes=2, process_id=2)
    with pytest.raises(ValueError, match="--distributed must be one of"):
        start_processes("maybe")
