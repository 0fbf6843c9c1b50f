"""Injects faults into real runs of small models and says what came of it.

    python -m scripts.faults [--faults=kills,disks] [--n_kills=200] [--out=FILE.jsonl]

Every run is a call of scripts.train. It must go on to the very state of a run that nothing happened
to, or stop with a message that says what to do; no checkpoint may be lost. Exit code 1 otherwise.
"""

import dataclasses
import os
import sys
import tempfile
import time
from typing import Any

from absl import flags

from scripts import common

_FAULTS = flags.DEFINE_list("faults", [], "Which; default: all.")
_N_KILLS = flags.DEFINE_integer("n_kills", 200, "Injections of SIGKILL.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments at which faults strike.")
_OUT = flags.DEFINE_string("out", "", "JSON-lines file for the table; '' = none.")
_KEEP = flags.DEFINE_string("keep", "", "Folder to keep the runs in; '' = they go.")


def main(arguments: list[str]) -> int:
    """Injects, prints the table, keeps it."""
    del arguments
    from longctx_jax.faults import FAULTS, Outcome, Victims
    from longctx_jax.runs import evaluate, sample, train  # noqa: F401  before it is forked

    unknown = [name for name in _FAULTS.value if name not in FAULTS]
    if unknown:
        raise common.UsageError(f"--faults must be of {', '.join(FAULTS)}: got {unknown[0]!r}")
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as temporary:
        victims = Victims(_KEEP.value or temporary, _SEED.value)
        for name in _FAULTS.value or FAULTS:
            start = time.monotonic()
            for outcome in FAULTS[name](victims, _N_KILLS.value):
                outcome.seconds = time.monotonic() - start
                print(line(outcome), flush=True)
                keep(outcome)
                outcomes.append(outcome)
    print(f"\n{header()}\n" + "\n".join(map(line, outcomes)))
    return 0 if all(outcome.is_well for outcome in outcomes) else common.EXIT_FAILED


def keep(outcome: Any) -> None:
    """Appends a row to --out, from a process of its own: this one must never use a device."""
    if not _OUT.value:
        return
    pid = os.fork()
    if pid == 0:
        from longctx_jax.benchmarking import environment, rows

        command = environment.command_line("scripts.faults", sys.argv[1:])
        found = dataclasses.asdict(outcome)
        case = {"suite": "faults", "fault": found.pop("fault"), "detail": found.pop("detail")}
        row = rows.make(case, found, environment.environment(command))
        rows.append(_OUT.value, [row])
        os._exit(0)
    os.waitpid(pid, 0)


def header() -> str:
    """The table's first line."""
    return f"{'fault':<28}{'n':>4}{'survived':>10}{'refused':>9}{'lost':>6}  "


def line(outcome: Any) -> str:
    """One line of the table."""
    mark = "" if outcome.is_well else "FAILED "
    counts = f"{outcome.n:>4}{outcome.n_survived:>10}{outcome.n_refused:>9}{outcome.n_lost:>6}"
    return f"{outcome.fault:<28}{counts}  {mark}{outcome.detail}; {outcome.note}"


if __name__ == "__main__":
    common.run(main)
