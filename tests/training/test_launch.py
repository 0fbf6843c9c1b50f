"""Slurm: the job script, one submission an array, and what a job does when it is told to end.

Slurm's commands are shell scripts here; `srun` runs the job as the real one would, one process a
task, so everything but the scheduler is what a cluster runs.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from configs.sweep_tools import vary
from longctx_jax.training import launch
from longctx_jax.training import sweep as sweeps

submitit = launch.import_submitit()
PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent

# Waits until it is told to save; a second start finds what was saved, and finishes.
FAKE_TRAIN = """
import json, os, pathlib, signal, sys, time
flags = dict(a.removeprefix("--").split("=", 1) for a in sys.argv[1:])
workdir, mode = pathlib.Path(flags["workdir"]), flags["config.mode"]
saved = workdir / f"saved{os.environ['SLURM_PROCID']}"
def stop(number, frame):
    saved.write_text(signal.Signals(number).name)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("task", os.environ["SLURM_PROCID"], "in", os.getcwd(), flush=True)
if mode == "fail":
    sys.exit("error: out of luck")
if mode == "wait" and not saved.exists():
    waiting = workdir / "starting"
    waiting.write_text(str(os.getpid()))
    waiting.rename(workdir / f"waiting{os.environ['SLURM_PROCID']}")
    time.sleep(30)
(workdir / "DONE.json").write_text(json.dumps({"step": 5, "eval": {"bits_per_byte": 1.5}}))
"""
# Logs its arguments; sacct answers with the states in a file.
COMMANDS = {
    "sbatch": 'echo "$@" >>"$0.log"; echo "Submitted batch job 12"',
    "scontrol": 'echo "$@" >>"$0.log"',
    "sacct": 'echo "JobID|State|NodeList"; cat "$0.states" 2>/dev/null || true',
    "srun": 'echo $$ >"$0.pid"; shift; while [[ $1 == --* ]]; do shift 2; done; exec "$@"',
}


class Slurm:
    """A cluster of shell scripts."""

    def __init__(self, folder):
        self.folder = folder

    def log(self, command):
        path = self.folder / f"{command}.log"
        return path.read_text().splitlines() if path.exists() else []

    def set_states(self, **states):
        lines = [f"{job.removeprefix('job')}|{state}|" for job, state in states.items()]
        (self.folder / "sacct.states").write_text("\n".join(lines) + "\n")
        submitit.SlurmJob.watcher.clear()

    def signal(self, *numbers):
        """Sends signals to the task started last, as Slurm does."""
        pid = int((self.folder / "srun.pid").read_text())
        for number in numbers:
            os.kill(pid, number)

    def start(self, index, rank=0):
        """Starts a task of a job of the array as Slurm would."""
        script = self.log("sbatch")[-1]
        task = {"SLURM_JOB_ID": "20", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": index}
        task |= {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": 2}
        path = self.folder.parent / "sweep" / "slurm" / "12_submission.sh"
        assert pathlib.Path(script).suffix == ".sh" and path.is_file()
        return subprocess.Popen(
            ["bash", path],
            env=os.environ | {name: str(value) for name, value in task.items()},
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Puts Slurm's commands on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(PROJECT)
    submitit.SlurmJob.watcher.clear()
    return Slurm(folder)


@pytest.fixture
def plan(tmp_path):
    script = tmp_path / "fake_train.py"
    script.write_text(FAKE_TRAIN)

    def make(*modes):
        return sweeps.plan_runs(
            vary("mode", *modes),
            tmp_path / "sweep",
            base="configs/base.py",
            settings={},
            command_prefix=(sys.executable, str(script)),
        )

    return make


def submit(runs, **options):
    lines = []
    workdir = runs[0].workdir.parent
    outcomes = launch.submit(runs, workdir, launch.SlurmOptions(**options), lines.append)
    return outcomes, lines


def wait_for(path):
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


def test_the_script_asks_for_what_the_options_say(tmp_path):
    options = launch.SlurmOptions(
        partition="gpu",
        account="me",
        time_min=90,
        gpus_per_node=4,
        cpus_per_task=8,
        mem_gb=64,
        array_limit=3,
        signal_delay_s=77,
        setup=("module load cuda",),
        parameters=("qos=high", "constraint=a100|h100"),
    )
    lines = launch.render_script(5, tmp_path / "my sweep", options).splitlines()
    assert {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")} >= {
        "partition=gpu",
        "account=me",
        "time=90",
        "nodes=1",
        "ntasks-per-node=1",
        "gpus-per-node=4",
        "cpus-per-task=8",
        "mem=64GB",
        "array=0-4%3",
        "signal=USR2@77",
        "requeue",
        "qos=high",
        "constraint='a100|h100'",
        "job-name='my sweep'",
    }
    assert lines.index("module load cuda") < lines.index("export SUBMITIT_EXECUTOR=slurm")
    command = lines[lines.index("export SUBMITIT_EXECUTOR=slurm") + 1]
    assert command.startswith("srun --unbuffered")
    assert command.endswith(f"-u -m submitit.core._submit '{tmp_path}/my sweep/slurm'")


@pytest.mark.parametrize(
    ("options", "n_tasks"),
    [
        ({"nodes": 2, "gpus_per_node": 4}, 4),
        ({"nodes": 2, "gpus_per_node": 4, "tasks_per_node": 1}, 1),
        ({"nodes": 2}, 1),
        ({"gpus_per_node": 4}, 1),
    ],
)
def test_processes_of_a_run_on_several_nodes(tmp_path, options, n_tasks):
    script = launch.render_script(1, tmp_path, launch.SlurmOptions(**options))
    assert f"--nodes={options.get('nodes', 1)}\n" in script
    assert f"--ntasks-per-node={n_tasks}\n" in script and "--array" not in script


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"nodes": 0}, "--slurm_nodes must be at least 1: got 0"),
        ({"parameters": ("qos",)}, "takes an option of sbatch and its value: got 'qos'"),
    ],
)
def test_impossible_options_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        launch.SlurmOptions(**options)


def test_all_runs_are_one_array(slurm, plan, tmp_path):
    runs = plan("ok", "wait", "fail")
    outcomes, lines = submit(runs, array_limit=2)
    assert outcomes == {run.name: "submitted" for run in runs}
    assert len(slurm.log("sbatch")) == 1
    script = (tmp_path / "sweep" / "slurm" / "12_submission.sh").read_text()
    assert "#SBATCH --array=0-2%2\n" in script
    assert script == launch.render_script(3, tmp_path / "sweep", launch.SlurmOptions(array_limit=2))
    jobs = json.loads((tmp_path / "sweep" / "slurm" / "jobs.json").read_text())
    assert jobs == {run.name: f"12_{index}" for index, run in enumerate(runs)}
    for text in ("submitted 3 runs as job 12", "squeue --job=12", "scancel 12", "same command"):
        assert any(text in line for line in lines), text


def test_a_second_submission_leaves_running_jobs_alone(slurm, plan):
    runs = plan("ok", "wait", "fail")
    submit(runs)
    slurm.set_states(job12_0="RUNNING", job12_1="FAILED", job12_2="CANCELLED by 1000")
    outcomes, _ = submit(runs)
    assert list(outcomes.values()) == ["running", "submitted", "submitted"]
    assert len(slurm.log("sbatch")) == 2
    slurm.set_states(**{"job12_[0-5%2]": "PENDING"})
    assert set(submit(runs)[0].values()) == {"pending"}
    assert len(slurm.log("sbatch")) == 2


def test_a_job_that_slurm_does_not_know_may_still_run(slurm, plan):
    runs = plan("ok", "wait")
    submit(runs)
    with pytest.raises(ValueError, match=r"mode=ok was submitted as job 12_0, of which sacct"):
        submit(runs)


def test_a_file_of_jobs_is_not_trusted(slurm, plan, tmp_path):
    runs = plan("ok", "wait")
    submit(runs)
    path = tmp_path / "sweep" / "slurm" / "jobs.json"
    for content in ('{"mode=ok": "12; rm"}', '{"mode=ok": 3}', "[", "[]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path}.*then delete the file"):
            submit(runs)


@pytest.mark.multiprocess
def test_jobs_run_their_commands(slurm, plan):
    runs = plan("ok", "fail")
    submit(runs)
    good, bad = slurm.start(0), slurm.start(1)
    assert good.wait(20) == 0 and bad.wait(20) != 0
    assert sweeps.result(runs[0])["bits_per_byte"] == 1.5
    assert f"task 0 in {PROJECT}" in sweeps.log_tail(runs[0])
    assert "error: out of luck" in sweeps.log_tail(runs[1])
    assert "error: out of luck" in bad.stdout.read() and slurm.log("scontrol") == []


@pytest.mark.multiprocess
def test_a_preempted_job_saves_is_requeued_and_resumes(slurm, plan):
    runs = plan("wait", "ok")
    submit(runs)
    job = slurm.start(0)
    wait_for(runs[0].workdir / "waiting0")
    slurm.signal(signal.SIGTERM, signal.SIGUSR2)  # both, as with send_user_signal
    assert job.wait(20) != 0
    assert (runs[0].workdir / "saved0").read_text() == "SIGTERM"
    assert slurm.log("scontrol") == ["requeue 12_0"] and sweeps.result(runs[0]) is None
    assert slurm.start(0).wait(20) == 0
    assert sweeps.result(runs[0])["step"] == 5


@pytest.mark.multiprocess
def test_the_trainer_is_not_killed_by_the_warning(slurm, plan):
    runs = plan("wait", "ok")
    submit(runs)
    job = slurm.start(0)
    wait_for(runs[0].workdir / "waiting0")
    os.kill(int((runs[0].workdir / "waiting0").read_text()), signal.SIGUSR2)
    slurm.signal(signal.SIGUSR2)
    assert job.wait(20) != 0 and slurm.log("scontrol") == ["requeue 12_0"]
    assert (runs[0].workdir / "saved0").exists()


@pytest.mark.multiprocess
def test_a_terminated_job_that_slurm_leaves_alive_is_requeued(slurm, plan, tmp_path):
    run = plan("wait")[0]
    executor = submitit.SlurmExecutor(tmp_path / "sweep" / "slurm")
    task = launch.RunTask(run, PROJECT, end_wait_s=0.5)
    executor.submit_array([task, task])
    job = slurm.start(0)
    wait_for(run.workdir / "waiting0")
    slurm.signal(signal.SIGTERM)
    wait_for(run.workdir / "saved0")
    assert slurm.log("scontrol") == []
    assert job.wait(20) != 0 and slurm.log("scontrol") == ["requeue 12_0"]


@pytest.mark.multiprocess
def test_every_process_saves_and_the_first_requeues(slurm, plan):
    runs = plan("wait", "ok")
    submit(runs, nodes=2)
    job = slurm.start(0, rank=1)
    wait_for(runs[0].workdir / "waiting1")
    slurm.signal(signal.SIGUSR2)
    assert job.wait(20) == 0 and slurm.log("scontrol") == []
    assert (runs[0].workdir / "saved1").read_text() == "SIGTERM"
    assert "task 1" in sweeps.log_tail(runs[0], log_file="log.1.txt")


def test_without_slurm_or_submitit_the_error_says_what_is_missing(plan, monkeypatch, tmp_path):
    runs = plan("ok")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="where Slurm's commands are: sbatch, srun"):
        submit(runs)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match=r'pip install "longctx_jax\[slurm\]"'):
        submit(runs)


class TestScript:
    """`python -m scripts.sweep --launcher=slurm`."""

    def run(self, tmp_path, *arguments):
        command = [sys.executable, "-m", "scripts.sweep", f"--workdir={tmp_path / 'out'}"]
        command += ["--sweep=configs/sweeps/quickstart_lr.py", *arguments]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)

    def test_dry_run_prints_commands_and_script(self, tmp_path):
        flags = ("--slurm_nodes=2", "--slurm_setup=module load a", "--slurm_setup=ulimit -n 9")
        done = self.run(tmp_path, "--launcher=slurm", "--dry_run", *flags)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("scripts.train") == 6 and "--array=0-5%6" in done.stdout
        assert "--nodes=2\n" in done.stdout and "module load a\nulimit -n 9\n" in done.stdout
        assert not (tmp_path / "out").exists()

    def test_submits_and_summarises(self, slurm, tmp_path):
        done = self.run(tmp_path, "--launcher=slurm")
        assert done.returncode == 0, done.stderr
        assert "submitted 6 runs as job 12" in done.stdout and len(slurm.log("sbatch")) == 1
        table = (tmp_path / "out" / "summary.csv").read_text()
        assert table.count("submitted") == 6

    def test_flags_that_would_be_ignored_are_refused(self, tmp_path):
        done = self.run(tmp_path, "--slurm_nodes=2")
        assert done.returncode == 2 and "--slurm_nodes needs --launcher=slurm" in done.stderr
