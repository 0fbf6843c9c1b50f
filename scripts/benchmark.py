"""Measures a suite: python -m scripts.benchmark --suite=NAME [--out=FILE] [--quick].

Appends rows to FILE (JSON lines), draws FILE with .png, prints a table. Shapes are the config's:
--config=FILE and --config.field=value as everywhere; some suites have shapes of their own. Which
suites there are, and what flags they have: `longctx_jax/benchmarking/registry.py` and the folder
of each. Nothing here sets XLA flags; rows record them.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from longctx_jax.benchmarking.registry import SUITES
from longctx_jax.benchmarking.suite import Request, RequestError, checked
from scripts import common

_SUITE = flags.DEFINE_enum("suite", None, list(SUITES), "What to measure.", required=True)
_CONFIG = common.config_flag(default="configs/quickstart.py")
_OUT = flags.DEFINE_string("out", "", "JSON-lines file; empty = results/<suite>_<device>.jsonl.")
_N_RUNS = flags.DEFINE_integer("n_runs", 20, "Measured runs of each case.", lower_bound=1)
_MAX_SECONDS = flags.DEFINE_float(
    "max_seconds",
    120.0,
    "Stop a group of cases early after this (3 runs at least); 0 = never.",
    0.0,
)
_QUICK = flags.DEFINE_bool("quick", False, "Tiny shapes: shows that it runs, measures nothing.")
_LENGTHS = flags.DEFINE_list("lengths", [], "Sequence or context lengths (tokens), e.g. 256,4096.")
_PARTS = flags.DEFINE_list("parts", [], "Parts of the suite to run; empty = all.")


def define_options() -> dict[str, flags.FlagHolder]:
    """Defines a flag for every option of a suite, once for all suites that share its name."""
    holders = {}
    told: dict[str, dict[str, None]] = {}
    for name, suite in SUITES.items():
        for option in suite.options:
            told.setdefault(option.name, {})[f"{name}: {option.help}"] = None
    for suite in SUITES.values():
        for option in suite.options:
            if option.name not in holders:
                define = flags.DEFINE_bool if option.is_switch else flags.DEFINE_list
                default: Any = False if option.is_switch else []
                holders[option.name] = define(option.name, default, " ".join(told[option.name]))
    return holders


_OPTIONS = define_options()


def make_request() -> Request:
    """Returns what the flags ask for.

    Raises:
        UsageError: if they do not go together.
    """
    if not all(length.isdigit() and int(length) for length in _LENGTHS.value):
        raise common.UsageError(
            f"--lengths must be positive numbers of tokens: got {','.join(_LENGTHS.value)}"
        )
    from configs.llama_armt import SHAPES
    from longctx_jax.benchmarking.timing import Limits

    limits = Limits(
        n_runs=_N_RUNS.value,
        max_seconds=_MAX_SECONDS.value,
        is_quick=_QUICK.value,
        lengths=tuple(map(int, _LENGTHS.value)),
    )
    options = {name: holder.value for name, holder in _OPTIONS.items()}
    request = Request(
        _CONFIG.value, limits, tuple(_PARTS.value), SHAPES, options, mixers=common.mixers()
    )
    try:
        return checked(SUITES, _SUITE.value, request)
    except RequestError as error:
        raise common.UsageError(str(error)) from error


def main(arguments: list[str]) -> None:
    """Measures, records, draws, prints."""
    del arguments
    request = make_request()
    from longctx_jax.benchmarking import environment, rows, run

    suite = SUITES[_SUITE.value]
    command = environment.command_line("scripts.benchmark", sys.argv[1:])
    where = environment.environment(command) | {"is_quick": _QUICK.value}
    device = where["device"].lower().replace(" ", "_")
    # Quick rows measure nothing: they stay away from the recorded ones.
    folder = "runs/benchmark_quick" if _QUICK.value else "results"
    out = pathlib.Path(_OUT.value or f"{folder}/{_SUITE.value}_{device}.jsonl")
    if out.suffix == ".png":
        raise common.UsageError(
            f"--out must be the rows' file: got {out}; the figure lies beside it"
        )
    measured = []
    for row in run.measure(_SUITE.value, suite, request, where, out):
        measured.append(row)
        print(run.progress(rows.flat(row)), file=sys.stderr, flush=True)
    print(*run.told(suite, measured), sep="\n")
    picture = out.with_suffix(".png")
    run.draw(suite, out, picture)
    print(f"wrote {len(measured)} rows to {out}, and {picture}")
    for line in suite.after(request, rows.recorded(out), where) if suite.after else ():
        print(line)
    if where["platform"] == "cpu":
        print("these are CPU timings: they show that things run, not which method is faster")


if __name__ == "__main__":
    common.run(main)
