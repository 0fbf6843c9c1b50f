"""Runs every configuration of a sweep file on this machine and summarises the results.

    python -m scripts.sweep --sweep=configs/sweeps/NAME.py --workdir=DIR [--n_processes=1]
        [--dry_run] [--config=FILE] [--set=config.field=value ...]

Finished runs are skipped, unfinished and failed ones resume in their folders. With --n_processes
above 1 the runs share the machine's cores and memory, so each is slower.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from longctx_jax.training import sweep as sweeps
from scripts import common

_SWEEP = flags.DEFINE_string("sweep", None, "Sweep file: BASE and get_sweep().", required=True)
_WORKDIR = common.workdir_flag("Folder of the sweep; every run gets a sub-folder.")
_CONFIG = flags.DEFINE_string("config", "", "Config file to vary instead of the sweep's BASE.")
_SET = flags.DEFINE_multi_string("set", [], "config.field=value for all runs; repeatable.")
_N_PROCESSES = flags.DEFINE_integer("n_processes", 1, "Runs at a time.", lower_bound=1)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the command lines and stop.")
_LAUNCHER = flags.DEFINE_enum("launcher", "local", ["local"], "Where the runs are started.")

TRAIN = (sys.executable, "-m", "scripts.train")


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
                problem = common.override_problem(config, field, value)
                if problem:
                    raise ValueError(problem)


def report_failures(runs: Sequence[sweeps.Run], outcomes: dict[str, str]) -> bool:
    """Prints the log's end and the command to retry of each run that failed; whether any did."""
    bad = [run for run in runs if outcomes.get(run.name) in ("failed", "incomplete")]
    for run in bad:
        print(
            f"\n{outcomes[run.name]}: {run.name}; the end of {run.workdir / sweeps.LOG_FILE}:\n"
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
        from longctx_jax.benchmarking import plots  # here: matplotlib takes most of a second

        figure = plots.draw_sweep(rows, fields, y="bits_per_byte")
        figure.savefig(workdir / "summary.png")
        made.append(str(workdir / "summary.png"))
    columns = [*fields, "status", "step", "bits_per_byte", "nats_per_token"]
    print(f"\n{sweeps.format_table(rows, columns)}\n\nwrote {', '.join(made)}")


def launch(
    runs: Sequence[sweeps.Run], workdir: pathlib.Path, n_processes: int, dry_run: bool
) -> int:
    """Prints all command lines, runs what is not finished, summarises; returns the exit code."""
    waiting = [run for run in runs if sweeps.result(run) is None]
    for run in runs:
        print(run.shell_command if run in waiting else f"# finished: {run.shell_command}")
    print(
        f"{len(runs)} runs: {len(runs) - len(waiting)} finished, {len(waiting)} to run", flush=True
    )
    if dry_run:
        return 0
    sweeps.save_plan(runs, workdir)
    outcomes = sweeps.run_pool(waiting, n_processes, lambda line: print(line, flush=True))
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
    runs = sweeps.plan_runs(overrides, workdir, base=base, settings=settings, command_prefix=TRAIN)
    check_fields(runs, base)
    sweeps.check_plan(runs, workdir)
    return launch(runs, workdir, _N_PROCESSES.value, _DRY_RUN.value)


if __name__ == "__main__":
    common.run(main)
