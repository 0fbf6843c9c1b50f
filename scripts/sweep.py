"""Runs every configuration of a sweep file, here or on a Slurm cluster, and summarises the results.

    python -m scripts.sweep --sweep=configs/sweeps/NAME.py --workdir=DIR [--n_processes=1]
        [--launcher=local|slurm] [--dry_run] [--config=FILE] [--set=config.field=value ...]

Finished runs are skipped, unfinished and failed ones resume in their folders. With --n_processes
above 1 the runs share the machine's cores and memory, so each is slower. --launcher=slurm submits
them as an array of jobs and returns; the --slurm_ flags say what a job asks for (docs/cluster.md).
"""

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from longctx_jax import run_files
from longctx_jax.training import launch as launchers
from longctx_jax.training import sweep as sweeps
from scripts import common, overrides

_SWEEP = flags.DEFINE_string("sweep", None, "Sweep file: BASE and get_sweep().", required=True)
_WORKDIR = common.workdir_flag("Folder of the sweep; every run gets a sub-folder.")
_CONFIG = flags.DEFINE_string("config", "", "Config file to vary instead of the sweep's BASE.")
_SET = flags.DEFINE_multi_string("set", [], "config.field=value for all runs; repeatable.")
_N_PROCESSES = flags.DEFINE_integer("n_processes", 1, "Runs at a time.", lower_bound=1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the command lines and stop.")
_LAUNCHER = flags.DEFINE_enum("launcher", "local", ["local", "slurm"], "Where runs are started.")
_SLURM: dict[str, flags.FlagHolder[Any]] = {
    "partition": flags.DEFINE_string("slurm_partition", "", "Partition; '' = the default one."),
    "account": flags.DEFINE_string("slurm_account", "", "Account that is charged."),
    "time_min": flags.DEFINE_integer("slurm_time_min", 60, "Minutes until a run is requeued."),
    "nodes": flags.DEFINE_integer("slurm_nodes", 1, "Nodes of each run."),
    "tasks_per_node": flags.DEFINE_integer(
        "slurm_tasks_per_node", 0, "Processes; 0 = one, with several nodes one a GPU.", 0
    ),
    "gpus_per_node": flags.DEFINE_integer("slurm_gpus_per_node", 0, "GPUs.", 0),
    "cpus_per_task": flags.DEFINE_integer("slurm_cpus_per_task", 0, "Cores of a process.", 0),
    "mem_gb": flags.DEFINE_integer("slurm_mem_gb", 0, "Memory of a node; 0 = the default.", 0),
    "array_limit": flags.DEFINE_integer("slurm_array_limit", 16, "Runs at a time."),
    "signal_delay_s": flags.DEFINE_integer(
        "slurm_signal_delay_s", 120, "Seconds before the end of the time, to save in."
    ),
    "max_timeouts": flags.DEFINE_integer(
        "slurm_max_timeouts", 100, "Times a run may reach its time limit.", 0
    ),
    "setup": flags.DEFINE_multi_string("slurm_setup", [], "Shell line before a run; repeatable."),
    "parameters": flags.DEFINE_multi_string(
        "slurm_parameter", [], "Further option of sbatch, name=value; repeatable."
    ),
}

TRAIN = (sys.executable, "-m", "scripts.train")


def train_command() -> tuple[str, ...]:
    """Returns what starts a run, with the mixers that this sweep was given."""
    mixers = ",".join(flags.FLAGS.mixers)
    return (*TRAIN, f"--mixers={mixers}") if mixers else TRAIN


def load_sweep(path: str) -> tuple[str, list[dict[str, Any]]]:
    """The base config file and the overrides that a sweep file defines.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it lacks `BASE` or `get_sweep`.
        TypeError: if `get_sweep()` does not return a list of dicts.
    """
    module = common.load_module(path, "sweep file")
    for name in ("BASE", "get_sweep"):
        if not hasattr(module, name):
            raise ValueError(
                f"a sweep file must define BASE (a config file) and get_sweep(): {path} lacks "
                f"{name}; see configs/sweeps/quickstart_lr.py"
            )
    overrides = module.get_sweep()
    if not isinstance(overrides, list) or not all(isinstance(o, dict) for o in overrides):
        raise TypeError(
            f"get_sweep() must return a list of dicts: {path} returned {overrides!r}; "
            "build it with configs/sweep_tools.py"
        )
    return module.BASE, overrides


def check_fields(runs: Sequence[sweeps.Run], base: str) -> None:
    """Fails on a misspelt or ill-typed override before anything is started.

    Raises:
        ValueError: names the field and the closest one.
    """
    config = common.load_config(base)
    for run in runs:
        for part in run.command:
            if part.startswith("--config."):
                field, _, value = part.removeprefix("--config.").partition("=")
                problem = overrides.override_problem(config, field, value)
                if problem:
                    raise ValueError(problem)


def report_failures(runs: Sequence[sweeps.Run], outcomes: dict[str, str]) -> bool:
    """Prints the log's end and the command to retry of each run that failed; whether any did."""
    bad = [run for run in runs if outcomes.get(run.name) in ("failed", "incomplete")]
    for run in bad:
        print(
            f"\n{outcomes[run.name]}: {run.name}; the end of {run.workdir / run_files.LOG}:\n"
            f"{sweeps.log_tail(run)}\n  retry: {run.shell_command}",
            file=sys.stderr,
        )
    return bool(bad)


def summarise(runs: Sequence[sweeps.Run], outcomes: dict[str, str], workdir: pathlib.Path) -> None:
    """Writes summary.csv and summary.png and prints the table."""
    rows = sweeps.summary_rows(runs, outcomes)
    fields = sweeps.swept_fields(runs)
    sweeps.write_csv(rows, fields, workdir / "summary.csv")
    made = [str(workdir / "summary.csv")]
    if any(isinstance(row.get("bits_per_byte"), int | float) for row in rows):
        from longctx_jax.figures import curves  # here: matplotlib takes most of a second

        figure = curves.draw_sweep(rows, fields, y="bits_per_byte")
        figure.savefig(workdir / "summary.png")
        made.append(str(workdir / "summary.png"))
    columns = [*fields, "status", "step", "bits_per_byte", "nats_per_token"]
    print(f"\n{sweeps.format_table(rows, columns)}\n\nwrote {', '.join(made)}")


Launcher = Callable[[Sequence[sweeps.Run]], dict[str, str]]  # runs -> outcomes by name


def slurm_options() -> launchers.SlurmOptions:
    """Returns what the --slurm_ flags ask for."""
    values = {name: flag.value for name, flag in _SLURM.items()}
    return launchers.SlurmOptions(
        **values | {name: tuple(values[name]) for name in ("setup", "parameters")}
    )


def choose_launcher(workdir: pathlib.Path) -> Launcher:
    """Returns what starts runs and says what became of them.

    Raises:
        UsageError: for a flag that the launcher would ignore.
    """

    def report(line: str) -> None:
        print(line, flush=True)

    if _LAUNCHER.value == "slurm":
        options = slurm_options()
        return lambda runs: launchers.submit(runs, workdir, options, report)
    unused = [flag.name for flag in _SLURM.values() if flag.present]
    if unused:
        raise common.UsageError(
            f"--{unused[0]} needs --launcher=slurm: got --launcher=local; set it, or leave out "
            f"{', '.join(f'--{name}' for name in unused)}"
        )
    return lambda runs: sweeps.run_pool(runs, _N_PROCESSES.value, report)


def launch(
    runs: Sequence[sweeps.Run], workdir: pathlib.Path, launcher: Launcher, dry_run: bool
) -> int:
    """Prints all command lines, runs what is not finished, summarises; returns the exit code."""
    waiting = [run for run in runs if sweeps.result(run) is None]
    for run in runs:
        print(run.shell_command if run in waiting else f"# finished: {run.shell_command}")
    print(
        f"{len(runs)} runs: {len(runs) - len(waiting)} finished, {len(waiting)} to run", flush=True
    )
    if dry_run:
        if _LAUNCHER.value == "slurm" and waiting:
            print(launchers.render_script(len(waiting), workdir, slurm_options()))
        return 0
    sweeps.save_plan(runs, workdir)
    outcomes = launcher(waiting)
    summarise(runs, outcomes, workdir)
    failed = report_failures(runs, outcomes)
    if any(state in ("interrupted", "not started") for state in outcomes.values()):
        print("interrupted: the same command resumes the sweep", file=sys.stderr)
        return common.EXIT_INTERRUPTED
    return common.EXIT_FAILED if failed else 0


def main(arguments: list[str]) -> int:
    """Plans, checks, launches."""
    del arguments
    base, overrides = load_sweep(_SWEEP.value)
    base = _CONFIG.value or base
    workdir = pathlib.Path(_WORKDIR.value)
    settings = dict(map(sweeps.parse_setting, _SET.value))
    runs = sweeps.plan_runs(
        overrides, workdir, base=base, settings=settings, command_prefix=train_command()
    )
    check_fields(runs, base)
    sweeps.check_plan(runs, workdir)
    return launch(runs, workdir, choose_launcher(workdir), _DRY_RUN.value)


if __name__ == "__main__":
    common.run(main)
