"""Where the runs of a sweep are started: a pool on this machine, or an array of Slurm jobs.

Both start a run as one process with `sweep.start`, its output in the run's folder, and stop it with
SIGTERM, upon which the trainer saves. Submission, requeueing and states of Slurm jobs are those of
the package submitit, which keeps its files (a pickle of each job among them) in the sweep's folder
`slurm`. Not here: the meaning of Slurm's options, and how the processes of one run find each other
(`jax.distributed`, from the environment that Slurm gives them).
"""

import dataclasses
import json
import pathlib
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longctx_jax import json_files, run_files
from longctx_jax.training import sweep

SLURM_FOLDER = "slurm"  # of a sweep's folder: submitit's files and JOBS_FILE
JOBS_FILE = "jobs.json"  # name of a run -> id of the job it was last submitted as
END_WAIT_S = 120.0  # after SIGTERM; Slurm kills a cancelled job sooner (KillWait, 30 s by default)
_POLL_S = 0.2
# States in which a job is over and will not be requeued (sacct(1), JOB STATE CODES).
ENDED = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL")
ENDED += ("OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT")
COMMANDS = ("sbatch", "srun", "sacct", "scontrol")


@dataclasses.dataclass(frozen=True)
class SlurmOptions:
    """What a job of Slurm asks for; "" and 0 leave it to the cluster's defaults."""

    partition: str = ""
    account: str = ""
    time_min: int = 60
    nodes: int = 1  # of each run
    tasks_per_node: int = 0  # processes of a run; 0 = one a node, and with several nodes one a GPU
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    mem_gb: int = 0  # of a node
    array_limit: int = 16  # runs at a time
    signal_delay_s: int = 120  # from the warning to the end of the time: to save in
    max_timeouts: int = 100  # times a run may reach its time limit and be requeued
    setup: tuple[str, ...] = ()  # shell lines before the run starts
    parameters: tuple[str, ...] = ()  # further options of sbatch, name=value

    def __post_init__(self):
        for name in ("time_min", "nodes", "array_limit", "signal_delay_s"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--slurm_{name} must be at least 1: got {getattr(self, name)}; set it higher"
                )
        for text in self.parameters:
            if not all(text.partition("=")[::2]):
                raise ValueError(
                    f"--slurm_parameter takes an option of sbatch and its value: got {text!r}; "
                    "write --slurm_parameter=qos=high"
                )


class RunTask:
    """A run of a sweep as a job that submitit can submit, requeue and resume.

    A call is one process (task) of the job. It starts the run's command and waits. On SIGTERM, or
    the signal with which Slurm announces the end of the time or (`send_user_signal`) a preemption,
    it passes SIGTERM on, waits until the trainer has saved, and has the job requeued by submitit.
    Everything a requeued job needs is in the run's folder.
    """

    def __init__(self, run: sweep.Run, folder: pathlib.Path, end_wait_s: float = END_WAIT_S):
        """Takes the run, the folder that its command starts in, and see `END_WAIT_S`."""
        self.run = run
        self.folder = folder
        self.end_wait_s = end_wait_s

    def __call__(self) -> str:
        """Returns the outcome of the run.

        Raises:
            RuntimeError: if the command fails, so that the job counts as failed.
        """
        submitit = import_submitit()
        rank = submitit.JobEnvironment().global_rank
        warning = getattr(signal, f"SIG{submitit.JobEnvironment.USR_SIG}")
        received: list[int] = []
        handlers: dict[int, Any] = {
            number: signal.signal(number, lambda number, frame: received.append(number))
            for number in (signal.SIGTERM, warning)
        }
        log_file = run_files.LOG if rank == 0 else f"log.{rank}.txt"
        # Slurm may signal the trainer, too, which knows SIGTERM alone: it inherits this mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {warning})
        process = sweep.start(self.run, log_file, self.folder)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {warning})
        while process.poll() is None and not received:
            time.sleep(_POLL_S)
        if received and process.poll() is None:
            print(f"{signal.Signals(received[0]).name}: saving", file=sys.stderr, flush=True)
            process.terminate()
            process.wait()
        if received and sweep.result(self.run) is None:
            self._hand_back(received, warning, handlers)
            return "interrupted"
        if process.returncode:
            raise RuntimeError(
                f"exit code {process.returncode}; the end of {self.run.workdir / log_file}:\n"
                f"{sweep.log_tail(self.run, log_file=log_file)}"
            )
        return "finished" if sweep.result(self.run) else "incomplete"

    def _hand_back(self, received: list[int], warning: int, handlers: Mapping[int, Any]) -> None:
        """Calls submitit's handler of the warning: the first task of a job requeues it and exits.

        After a SIGTERM alone it first waits: Slurm ends jobs that were cancelled, and requeues by
        itself what a cluster is set to requeue when preempted. Who is still there was neither.
        """
        end = time.monotonic() + self.end_wait_s
        while warning not in received and time.monotonic() < end:
            time.sleep(_POLL_S)
        handlers[warning](warning, None)

    def checkpoint(self) -> Any:
        """Returns the submission that a requeued job runs: the same."""
        return import_submitit().helpers.DelayedSubmission(self)


def import_submitit() -> Any:
    """Returns the package `submitit`; raises ImportError naming the extra that has it."""
    try:
        import submitit
        import submitit.slurm.slurm
    except ImportError as error:
        raise ImportError(
            f"--launcher=slurm needs the package submitit, which cannot be imported ({error}); run "
            '`pip install "longctx_jax[slurm]"`, or use --launcher=local'
        ) from error
    return submitit


def slurm_parameters(options: SlurmOptions, name: str) -> dict[str, Any]:
    """Returns the options as submitit names Slurm's."""
    n_tasks = options.tasks_per_node
    if not n_tasks:  # jax.distributed gives each process of a Slurm job one device
        n_tasks = max(options.gpus_per_node, 1) if options.nodes > 1 else 1
    optional = {
        "partition": options.partition,
        "account": options.account,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": options.cpus_per_task,
        "mem": f"{options.mem_gb}GB" if options.mem_gb else "",
    }
    return {
        "job_name": name,
        "time": options.time_min,
        "nodes": options.nodes,
        "ntasks_per_node": n_tasks,
        "array_parallelism": options.array_limit,
        "signal_delay_s": options.signal_delay_s,
        "setup": list(options.setup),
        "additional_parameters": {"requeue": True}
        | {key: value for key, _, value in (text.partition("=") for text in options.parameters)},
        **{key: value for key, value in optional.items() if value},
    }


def render_script(n_runs: int, workdir: pathlib.Path, options: SlurmOptions) -> str:
    """Returns the batch script that would be submitted for `n_runs` runs; needs no Slurm."""
    submitit = import_submitit()
    folder = (workdir / SLURM_FOLDER).absolute()
    command = [sys.executable, "-u", "-m", "submitit.core._submit", str(folder)]
    return submitit.slurm.slurm._make_sbatch_string(  # the executor needs Slurm to be here
        command=shlex.join(command),
        folder=folder,
        map_count=n_runs if n_runs > 1 else None,
        **slurm_parameters(options, workdir.absolute().name),
    )


def submit(
    runs: Sequence[sweep.Run],
    workdir: pathlib.Path,
    options: SlurmOptions,
    report: Callable[[str], None] = print,
) -> dict[str, str]:
    """Submits the runs as one array of jobs, but for those that an earlier job still works on.

    Args:
        runs: to start, or to resume.
        workdir: folder of the sweep, on a file system that all nodes share.
        options: what each run asks for.
        report: gets a line on what was submitted, and how to follow it.

    Returns:
        By name: "submitted", or the state of its earlier job in lower case ("pending", ...).

    Raises:
        ImportError: if submitit is not installed.
        FileNotFoundError: if Slurm's commands are not here.
        ValueError: if it cannot be known whether an earlier job still works on a run.
    """
    if not runs:
        return {}
    submitit = import_submitit()
    absent = [name for name in COMMANDS if shutil.which(name) is None]
    if absent:
        raise FileNotFoundError(
            f"--launcher=slurm must run where Slurm's commands are: {', '.join(absent)} cannot be "
            "found; log in to a node of the cluster, or use --launcher=local"
        )
    folder = (workdir / SLURM_FOLDER).absolute()
    outcomes = active_states(runs, folder)
    for name, state in outcomes.items():
        report(f"{state}: {name}")
    waiting = [run for run in runs if run.name not in outcomes]
    if waiting:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=options.max_timeouts)
        executor.update_parameters(**slurm_parameters(options, workdir.absolute().name))
        jobs = executor.submit_array([RunTask(run, pathlib.Path.cwd()) for run in waiting])
        _save_jobs(folder, {run.name: job.job_id for run, job in zip(waiting, jobs, strict=True)})
        number = jobs[0].job_id.partition("_")[0]
        report(f"submitted {len(waiting)} runs as job {number}")
        report(f"  follow: squeue --job={number}; tail -f {workdir}/*/{run_files.LOG}")
        report(f"  stop:   scancel {number} (started runs save first)")
        report("  the same command again summarises, and submits what has ended unfinished")
    return outcomes | {run.name: "submitted" for run in waiting}


def active_states(runs: Sequence[sweep.Run], folder: pathlib.Path) -> dict[str, str]:
    """Returns the states, in lower case, of the jobs that still wait for or work on a run.

    Raises:
        ValueError: if Slurm does not know a job.
    """
    submitit = import_submitit()
    ids = _read_jobs(folder)
    jobs = {run.name: submitit.SlurmJob(folder, ids[run.name]) for run in runs if run.name in ids}
    states = {}
    for index, (name, job) in enumerate(jobs.items()):
        info = job.get_info(mode="cache" if index else "force")  # one call asks for all
        state = (info.get("State") or "UNKNOWN").split()[0]
        if state == "UNKNOWN":
            raise ValueError(
                f"two jobs must not work on one run: {name} was submitted as job {job.job_id}, of "
                f"which sacct knows nothing; try again in a minute, or end it with `scancel "
                f"{job.job_id}` and delete {folder / JOBS_FILE}"
            )
        if state not in ENDED:
            states[name] = state.lower()
    return states


def _read_jobs(folder: pathlib.Path) -> dict[str, str]:
    path = folder / JOBS_FILE
    if not path.exists():
        return {}
    jobs = json_files.read_object(path, remedy="end the sweep's jobs, then delete the file")
    if not all(isinstance(v, str) and re.fullmatch(r"[0-9]+(_[0-9]+)?", v) for v in jobs.values()):
        raise ValueError(
            f"{JOBS_FILE} must hold the id of each run's job: {path} holds something else; end the "
            "sweep's jobs, then delete the file"
        )
    return jobs


def _save_jobs(folder: pathlib.Path, jobs: dict[str, str]) -> None:
    temporary = folder / f"{JOBS_FILE}.tmp"
    temporary.write_text(json.dumps(_read_jobs(folder) | jobs, indent=1) + "\n")
    temporary.replace(folder / JOBS_FILE)
