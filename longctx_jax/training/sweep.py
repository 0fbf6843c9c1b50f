"""Sweeps: names, command lines and states of many runs, and a pool that runs them on this machine.

A sweep is a base config file and a list of overrides (`configs/sweep_tools.py`). Each override is
one run in its own sub-folder of the sweep's folder; `DONE.json`, which `scripts.train` writes last,
marks it as finished. Deliberately not here: clusters (`launch.py`), loading sweep files, tables on
screen, figures.
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from longctx_jax import json_files, run_files

PLAN_FILE = "sweep.json"
MAX_NAME_LEN = 100  # characters of a run's name
RESULT_COLUMNS = ("step", "split", "bits_per_byte", "nats_per_token", "tokens", "bytes")
_POLL_S = 0.2  # how often the pool looks at its processes

Overrides = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep: its overrides and the command that starts or resumes it."""

    name: str
    overrides: Overrides
    workdir: pathlib.Path
    command: tuple[str, ...]

    @property
    def shell_command(self) -> str:
        """The command as one would type it."""
        return shlex.join(self.command)


def run_name(overrides: Overrides) -> str:
    """A short, file-system-safe name made from the overrides sorted by field.

    `{"optim.learning_rate": 1e-3, "model.name": "decay"}` is named
    `model.name=decay,optim.learning_rate=0.001`. It depends on nothing else, so adding runs to a
    sweep renames none. Names over `MAX_NAME_LEN`, and values that had to be altered, get a hash.
    """
    exact = json.dumps(sorted(overrides.items()), default=str)
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    parts = [f"{field}={_value_text(overrides[field])}" for field in sorted(overrides)]
    name = ",".join(parts) or "base"
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", name)
    if len(safe) > MAX_NAME_LEN:
        safe = safe[: MAX_NAME_LEN - len(digest) - 1].rstrip(".,=+-")
    return safe if safe == name else f"{safe}-{digest}"


def config_flag(field: str, value: Any) -> str:
    """The command-line flag that sets a config field: `--config.model.name=decay`.

    Raises:
        TypeError: if a flag cannot carry the value (only int, float, bool, str and tuples can).
    """
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, int | float):
        text = repr(value)
    elif isinstance(value, str):
        text = value
    elif isinstance(value, tuple | list):
        text = repr(tuple(value))
    else:
        raise TypeError(
            f"a sweep varies int, float, bool, str or tuples: got {field}={value!r} "
            f"({type(value).__name__}); use one of these types"
        )
    return f"--config.{field}={text}"


def parse_setting(text: str) -> tuple[str, str]:
    """Splits `[--][config.]field=value` into field and value, both text.

    Raises:
        ValueError: if there is no field or no `=`.
    """
    field, equals, value = text.partition("=")
    field = field.removeprefix("--").removeprefix("config.")
    if not equals or not field:
        raise ValueError(
            f"--set takes config.field=value: got {text!r}; write --set=config.train.n_steps=100"
        )
    return field, value


def plan_runs(
    sweep: Sequence[Overrides],
    workdir: str | os.PathLike[str],
    *,
    base: str,
    settings: Mapping[str, str],
    command_prefix: Sequence[str],
) -> list[Run]:
    """The runs of a sweep, in its order, with their command lines; starts nothing.

    Args:
        sweep: one dict a run, from dotted field to value.
        workdir: folder of the sweep; each run gets the sub-folder of its name.
        base: config file that is varied.
        settings: further overrides for all runs, as text; not part of the names.
        command_prefix: what starts training: the interpreter, `-m`, the module.

    Raises:
        ValueError: if the sweep is empty, two runs have one name, or a field of `settings` varies.
    """
    if not sweep:
        raise ValueError("a sweep needs at least one run: get_sweep() returned none; add overrides")
    runs: dict[str, Run] = {}
    for overrides in sweep:
        both = sorted(set(overrides) & set(settings))
        if both:
            raise ValueError(
                f"--set must not name a swept field: got {both[0]}; remove one of them"
            )
        name = run_name(overrides)
        if name in runs:
            raise ValueError(
                f"the runs of a sweep must differ: {name} occurs twice; remove one of them"
            )
        folder = pathlib.Path(workdir) / name
        flags = [config_flag(field, value) for field, value in overrides.items()]
        flags += [config_flag(field, value) for field, value in settings.items()]
        command = (*command_prefix, f"--config={base}", f"--workdir={folder}", *flags)
        runs[name] = Run(name, dict(overrides), folder, command)
    return list(runs.values())


def check_plan(runs: Sequence[Run], workdir: str | os.PathLike[str]) -> None:
    """Refuses a folder in which runs of the same names were started with other settings.

    Otherwise a finished run of another configuration would be taken for one of this sweep.

    Raises:
        ValueError: names the first such run, and both flags; or the plan is not one.
    """
    plan = _read_plan(pathlib.Path(workdir) / PLAN_FILE)
    for run in runs:
        before = plan.get(run.name)
        if before is not None and before != _settings(run):
            old = " ".join(sorted(set(before) - set(_settings(run)))) or "(nothing)"
            new = " ".join(sorted(set(_settings(run)) - set(before))) or "(nothing)"
            raise ValueError(
                f"runs in {workdir} must keep their settings: {run.name} was started with {old}, "
                f"now has {new}; choose another --workdir"
            )


def save_plan(runs: Sequence[Run], workdir: str | os.PathLike[str]) -> None:
    """Records the settings of `runs` in `workdir/sweep.json`, beside those recorded before."""
    path = pathlib.Path(workdir) / PLAN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    plan = _read_plan(path) | {run.name: _settings(run) for run in runs}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(plan, indent=1) + "\n")
    os.replace(temporary, path)


def result(run: Run) -> dict[str, Any] | None:
    """The flat final metrics of a finished run; None while it is not finished."""
    done = _read_json(run.workdir / run_files.DONE)
    if not done:
        return None
    evaluation = done.get("eval")
    evaluation = evaluation if isinstance(evaluation, dict) else {}
    return {name: _plain(evaluation.get(name, done.get(name))) for name in RESULT_COLUMNS}


def run_pool(
    runs: Sequence[Run], n_processes: int, report: Callable[[str], None] = print
) -> dict[str, str]:
    """Runs the commands, at most `n_processes` at a time, and returns each one's outcome.

    Output goes to `log.txt` in each run's folder. A failure stops no other run. SIGINT or SIGTERM
    starts no more runs, passes SIGTERM to the running ones (which save and end) and waits; a second
    one kills them. The processes share the machine: no cores are assigned.

    Args:
        runs: to start, or to resume, in this order.
        n_processes: at most this many at once.
        report: gets one line as a run starts or ends.

    Returns:
        By name: "finished", "failed" (exit code not 0), "incomplete" (exit code 0 but no
        `DONE.json`), "interrupted" or "not started".
    """
    waiting = list(runs)
    active: dict[subprocess.Popen[bytes], tuple[Run, float]] = {}
    outcomes = {run.name: "not started" for run in runs}
    with _forwarded_signals(active) as received:
        while active or (waiting and not received):
            while waiting and len(active) < n_processes and not received:
                run = waiting.pop(0)
                process = start(run)
                active[process] = (run, time.monotonic())
                if received:  # it came while the process was being started
                    process.terminate()
                report(f"started: {run.name}")
            time.sleep(_POLL_S if active else 0)
            for process in [p for p in active if p.poll() is not None]:
                run, start_s = active.pop(process)
                outcomes[run.name] = _outcome(run, process.returncode, bool(received))
                n_left = len(waiting) + len(active)
                report(
                    f"{outcomes[run.name]}: {run.name} (exit code {process.returncode}, "
                    f"{time.monotonic() - start_s:.0f} s, {n_left} to go)"
                )
    return outcomes


def start(
    run: Run, log_file: str = run_files.LOG, folder: str | os.PathLike[str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts the command, with its output appended to a file of the run's folder.

    In its own session, so that Ctrl-C reaches it only through the one who waits for it.

    Args:
        run: to start, or to resume.
        log_file: name of the file.
        folder: to start in; None = the current one.
    """
    run.workdir.mkdir(parents=True, exist_ok=True)
    with (run.workdir / log_file).open("a") as log:
        log.write(f"$ {run.shell_command}\n")
        log.flush()
        return subprocess.Popen(
            run.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def log_tail(run: Run, n_lines: int = 15, log_file: str = run_files.LOG) -> str:
    """The last lines of a run's log, indented."""
    path = run.workdir / log_file
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join(f"    {line}" for line in lines[-n_lines:])


def summary_rows(runs: Sequence[Run], outcomes: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row a run: `run`, its overrides, `status`, and the final metrics of finished runs.

    Args:
        runs: all runs of the sweep.
        outcomes: of those that were started; the others count by their `DONE.json`.
    """
    rows = []
    for run in runs:
        final = result(run)
        status = "finished" if final else outcomes.get(run.name, "not started")
        rows.append({"run": run.name, **run.overrides, "status": status, **(final or {})})
    return rows


def swept_fields(runs: Sequence[Run]) -> list[str]:
    """The fields that any run overrides, in order of appearance."""
    return list(dict.fromkeys(field for run in runs for field in run.overrides))


def write_csv(
    rows: Sequence[Mapping[str, Any]], fields: Sequence[str], path: str | os.PathLike[str]
) -> None:
    """Writes the rows, with the overrides in `fields` as columns."""
    columns = ["run", *fields, "status", *RESULT_COLUMNS]
    with pathlib.Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The columns of `rows` as aligned text, header first."""
    cells = [list(columns)] + [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )
    return "\n".join(lines)


def _outcome(run: Run, exit_code: int, interrupted: bool) -> str:
    if exit_code == 0 and result(run):
        return "finished"
    if interrupted:
        return "interrupted"
    return "failed" if exit_code else "incomplete"


@contextlib.contextmanager
def _forwarded_signals(active: Mapping[subprocess.Popen[bytes], Any]) -> Iterator[list[int]]:
    """While active, SIGINT and SIGTERM go to the processes; yields the list of those received."""
    received: list[int] = []

    def forward(number: int, frame: object) -> None:
        del frame
        received.append(number)
        for process in list(active):
            if process.poll() is None:
                process.kill() if len(received) > 1 else process.terminate()

    old = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _settings(run: Run) -> list[str]:
    """The flags of a run that decide its result."""
    return [part for part in run.command if part.startswith("--config")]


def _read_plan(path: pathlib.Path) -> dict[str, list[str]]:
    """The flags of each run in `sweep.json`, none if there is no such file."""
    if not path.exists():
        return {}
    remedy = "choose another --workdir, or delete the file if its runs had the same settings"
    plan = json_files.read_object(path, remedy=remedy)
    for name, flags in plan.items():
        if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
            raise ValueError(f"{path} must hold flags of runs: {name} has {flags!r:.200}; {remedy}")
    return plan


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in the file; empty if the file is missing, torn or holds something else."""
    try:
        return json_files.read_object(path, remedy="")
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}


def _plain(value: Any) -> Any:
    """The value if it is a number or a word, as results are; None for anything else."""
    is_word = isinstance(value, str) and value.isprintable()
    is_number = isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)
    return value if is_word or is_number else None


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, tuple | list):
        return "+".join(map(_value_text, value)) or "none"
    return str(value)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
