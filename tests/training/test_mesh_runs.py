"""Training spread over devices and processes: the losses of one device, for every scheme."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.tiny import PROJECT, flags
from tests.training.mesh_runs import SCHEMES

CASES = [
    *(f"{scheme}+model" for scheme in ("dropout", "vq", "decay", "stagformer", "mamba")),
    *(f"{scheme}+fsdp" for scheme in ("armt", "inattention", "rwkv")),
    *(f"{scheme}+sequence" for scheme in ("transformer", "vq", "decay", "armt", "rwkv", "mamba")),
    "decay+data",
    "diagonal+layer",
]
TOLERANCE = 2e-6  # relative, of a loss after three updates


def start(folder, cases, *process, n_devices):
    """Starts one process of a run."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.mesh_runs", str(folder), ",".join(cases), *process],
        cwd=PROJECT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(n_devices)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    out, err = process.communicate(timeout=1500)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one device finds."""
    folder = tmp_path_factory.mktemp("alone")
    return result(start(folder, [f"{scheme}+one" for scheme in SCHEMES], n_devices=1))


def require_same(found, alone, cases):
    for case in cases:
        expected = alone[f"{case.split('+')[0]}+one"]
        assert found[case] == pytest.approx(expected, rel=TOLERANCE), case


@pytest.mark.slow
def test_eight_devices_train_as_one(alone, tmp_path):
    found = result(start(tmp_path, CASES, n_devices=8))
    assert (found["devices"], found["processes"]) == (8, 1)
    require_same(found, alone, CASES)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_of_four_devices_train_as_one(alone, tmp_path):
    cases = [f"{scheme}+fsdp" for scheme in SCHEMES if scheme != "diagonal"]
    cases += ["decay+sequence", "decay+model"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [start(tmp_path, cases, str(i), port, n_devices=4) for i in range(2)]
    for found in map(result, processes):
        assert (found["devices"], found["processes"]) == (8, 2)
        require_same(found, alone, cases)


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(alone, tmp_path):
    """Six steps on eight devices and then on one are six steps on one."""
    program = """
import json, sys, pathlib
from tests.training.mesh_runs import run_case
folder, n_steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
mesh = {"mesh__fsdp": "on"} if sys.argv[3] == "8" else {}
fields = {"train__n_steps": n_steps, "train__checkpoint_every": 3, **mesh}
print(json.dumps(run_case(folder, "decay", "one", **fields)))
"""

    def go(folder, n_steps, n_devices):
        done = subprocess.run(
            [sys.executable, "-c", program, str(folder), str(n_steps), str(n_devices)],
            cwd=PROJECT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(n_devices)},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    expected = go(tmp_path / "one", 6, 1)
    go(tmp_path / "moved", 3, 8)
    assert go(tmp_path / "moved", 6, 1) == pytest.approx(expected, rel=TOLERANCE)
    go(tmp_path / "back", 3, 1)
    assert go(tmp_path / "back", 6, 8) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    run = tmp_path / "run"
    fields = flags(train__n_steps=100_000, train__checkpoint_every=100_000, mesh__fsdp="on")
    command = [sys.executable, "-m", "scripts.train", "--config=configs/base.py", *fields]
    command += [f"--workdir={run}", f"--coordinator_address=localhost:{port}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            cwd=PROJECT,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    metrics = run / "metrics.jsonl"
    end = time.monotonic() + 200
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors[0][-2000:]
    (saved,) = [path.name for path in (run / "checkpoints").iterdir()]
    assert f"stop of another process: saving step {saved}" in errors[0]
    assert f"SIGTERM: saving step {saved}" in errors[1]
