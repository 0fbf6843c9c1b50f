"""Measures a suite: python -m scripts.benchmark --suite=NAME [--out=FILE] [--quick].

NAME is train, decode, decay, vq or memory. Appends rows to FILE (JSON lines), draws FILE with .png,
prints a table. Shapes are the config's: --config=FILE and --config.field=value as everywhere; the
suites decay, vq and memory have shapes of their own. --peers times others' code beside ours: in the
suite decay the libraries that are installed (--peers=all), in vq checkouts of the published
implementation (--peers=FOLDER[,FOLDER]). --record makes the rows of decay the table that "auto"
decides by. Nothing here sets XLA flags; rows record them.
"""

import functools
import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from scripts import common

_SUITE = flags.DEFINE_enum(
    "suite", None, ["train", "decode", "decay", "vq", "memory"], "What to measure.", required=True
)
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
_HEADS = flags.DEFINE_list("heads", [], "vq: head types (shga, mqa, mha); empty = all.")
_SHAPES = flags.DEFINE_list(
    "shapes", [], "memory, decode: LLaMA shapes on a GPU (160m, 1b, 3b, 8b); empty = 160m and 1b."
)
_PEERS = flags.DEFINE_list(
    "peers",
    [],
    "Whose code to time beside ours. decay: all = other libraries that are installed. vq: folders "
    "of checkouts of the published implementation, of either branch.",
)
_RECORD = flags.DEFINE_bool(
    "record", False, 'decay: write the table that "auto" decides by, from all rows in --out.'
)


SHAPED = ("memory", "decode")  # suites with LLaMA shapes on a GPU


def measure(config: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of the suite that the flags ask for."""
    from configs.llama_armt import SHAPES
    from longctx_jax.benchmarking import (
        cache_suite,
        decay_suite,
        decode_suite,
        initial_suite,
        memory_suite,
        saving_suite,
        stack_suite,
        suites,
        vq_cases,
        vq_suite,
    )

    suite = _SUITE.value
    parts_of = {
        "train": (*suites.PARTS, *saving_suite.PARTS),
        "decode": decode_suite.PARTS,
        "decay": decay_suite.PARTS,
        "vq": vq_suite.PARTS,
        "memory": memory_suite.PARTS,
    }
    known = parts_of.get(suite, ())
    _require_known("parts", _PARTS.value, known)
    _require_known("heads", _HEADS.value, vq_cases.HEADS if suite == "vq" else ())
    _require_known("shapes", _SHAPES.value, tuple(SHAPES) if suite in SHAPED else ())
    if not all(length.isdigit() and int(length) for length in _LENGTHS.value):
        raise common.UsageError(
            f"--lengths must be positive numbers of tokens: got {','.join(_LENGTHS.value)}"
        )
    if suite != "decay" and _RECORD.value:
        raise common.UsageError(f"--record belongs to --suite=decay: got {suite}")
    checkouts = _peers(suite)
    if _RECORD.value and _QUICK.value:
        raise common.UsageError(
            "--record needs real measurements: got --quick, whose shapes measure nothing; "
            "leave one of them out"
        )
    limits = suites.Limits(
        n_runs=_N_RUNS.value,
        max_seconds=_MAX_SECONDS.value,
        is_quick=_QUICK.value,
        lengths=tuple(map(int, _LENGTHS.value)),
    )
    parts = _PARTS.value or known
    shapes = {name: SHAPES[name] for name in _SHAPES.value or ("160m", "1b")}
    if suite == "decode":
        rows = {
            "mixers": functools.partial(decode_suite.decode_rows, config, limits),
            "stacks": functools.partial(stack_suite.stack_rows, limits, shapes),
            "initial": functools.partial(initial_suite.initial_rows, limits, shapes),
            "attention": functools.partial(cache_suite.cache_rows, limits),
        }
        return itertools.chain.from_iterable(rows[part]() for part in parts)
    if suite == "decay":
        return decay_suite.decay_rows(limits, parts, with_peers=bool(_PEERS.value))
    if suite == "vq":
        heads = _HEADS.value or vq_cases.HEADS
        return vq_suite.vq_rows(config, limits, parts, heads=heads, checkouts=checkouts)
    if suite == "memory":
        return memory_suite.memory_rows(config, limits, parts, shapes=shapes)
    timed = suites.train_rows(config, limits, [part for part in parts if part in suites.PARTS])
    saves = saving_suite.saving_rows(config, limits) if "saves" in parts else ()
    return itertools.chain(timed, saves)


def _require_known(flag: str, given: list[str], known: Sequence[str]) -> None:
    unknown = [value for value in given if value not in known]
    if unknown:
        raise common.UsageError(
            f"--{flag} must be among {', '.join(known) or 'none'} in the suite {_SUITE.value}: got "
            f"{', '.join(unknown)}"
        )


def _peers(suite: str) -> list[Any]:
    """Checks --peers, and returns the checkouts of the published implementation, imported."""
    given = _PEERS.value
    if not given or suite == "decay":
        _require_known("peers", given, ("all",) if suite == "decay" else ())
        return []
    if suite != "vq":
        raise common.UsageError(
            f"--peers belongs to --suite=decay and --suite=vq: got {suite} and {','.join(given)}"
        )
    from longctx_jax.benchmarking import vq_peers

    return [vq_peers.load(pathlib.Path(folder)) for folder in given]


def is_summary(row: dict[str, Any]) -> bool:
    """Whether a row of these suites is about other rows: those are printed as sentences."""
    summed_up = "speed_ratio" in row or "exponent" in row or row["name"] == "crossover"
    return row["suite"] in ("decay", "decode", "vq", "memory") and summed_up


def summary_text(row: dict[str, Any]) -> str:
    """Returns a row about other rows as one line, "" for any other row."""
    from longctx_jax.benchmarking import (
        decay_summary,
        figures,
        memory_suite,
        stack_suite,
        vq_suite,
    )

    suites = {"vq": vq_suite, "memory": memory_suite, "decode": stack_suite}
    if row["suite"] in suites and is_summary(row):
        return suites[row["suite"]].summary_text(row)
    if row["name"] == "crossover":
        return decay_summary.crossover_text(row)
    if "overhead_fraction" in row:
        return (
            f"saving every {row['checkpoint_every']} steps: {100 * row['overhead_fraction']:.2f} % "
            f"of the run ({row['save_wait_ms']:.0f} ms a save waited for, "
            f"{row['save_extra_ms']:.0f} ms in all)"
        )
    if "speed_ratio" not in row:
        return ""
    return (
        f"{figures.case_name(row)}: {row['speed_ratio']:.3f} tokens/s for tokens/s (quartiles "
        f"{row['speed_ratio_quartile_1']:.3f} to {row['speed_ratio_quartile_3']:.3f})"
    )


def record_table(rows: list[dict[str, Any]], fields: dict[str, Any]) -> None:
    """Writes the table of this device from the newest rows by this jax, and checks "auto"."""
    from longctx_jax.benchmarking import decay_summary, figures

    same = ("device", "jax_version")
    rows = [row for row in rows if not row.get("is_quick")]
    rows = [row for row in rows if all(row.get(name) == fields[name] for name in same)]
    recorded = figures.newest(rows)
    path, wrong = decay_summary.record(recorded, fields)
    n_shapes = len(decay_summary.table_rows(recorded))
    print(f"wrote {n_shapes} shapes to {path}")
    for line in wrong:
        print(f"auto is not within 10 % of the best: {line}")
    if not wrong:
        print("auto is within 10 % of the best form at every recorded shape and pass")


def main(arguments: list[str]) -> None:
    """Measures, records, draws, prints."""
    del arguments
    rows_of_suite = measure(_CONFIG.value)
    from longctx_jax.benchmarking import figures, timing

    fields: dict[str, Any] = timing.environment(
        timing.command_line("scripts.benchmark", sys.argv[1:])
    ) | {"is_quick": _QUICK.value}
    device = fields["device"].lower().replace(" ", "_")
    # Quick rows measure nothing: they stay away from the recorded ones.
    folder = "runs/benchmark_quick" if _QUICK.value else "results"
    out = pathlib.Path(_OUT.value or f"{folder}/{_SUITE.value}_{device}.jsonl")
    if out.suffix == ".png":
        raise common.UsageError(
            f"--out must be the rows' file: got {out}; the figure lies beside it"
        )
    rows = []
    for row in rows_of_suite:
        row = row | fields
        timing.write_rows(out, [row])
        rows.append(row)
        print(figures.progress(row), file=sys.stderr, flush=True)
    print(figures.format_table([row for row in rows if not is_summary(row)]))
    for text in filter(None, map(summary_text, rows)):
        print(text)
    picture = out.with_suffix(".png")
    recorded = timing.read_rows(out)
    figures.draw_rows(recorded).savefig(picture)
    print(f"wrote {len(rows)} rows to {out}, and {picture}")
    if _RECORD.value:
        record_table(recorded, fields)
    if fields["platform"] == "cpu":
        print("these are CPU timings: they show that things run, not which method is faster")


if __name__ == "__main__":
    common.run(main)
