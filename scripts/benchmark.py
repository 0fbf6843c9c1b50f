"""Measures a suite: python -m scripts.benchmark --suite=train|decode [--out=FILE] [--quick].

Appends rows to FILE (JSON lines), draws FILE with .png, prints a table. Shapes are the config's:
--config=FILE and --config.field=value as everywhere. Nothing here sets XLA flags; rows record them.
"""

import pathlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from scripts import common

_SUITE = flags.DEFINE_enum("suite", None, ["train", "decode"], "What to measure.", required=True)
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
_PARTS = flags.DEFINE_list(
    "parts", ["models", "lengths", "schedules"], "Parts of the train suite to run."
)


def measure(config: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of the suite that the flags ask for."""
    from longctx_jax.benchmarking import decode_suite, suites

    unknown = [part for part in _PARTS.value if part not in suites.PARTS]
    if unknown:
        raise common.UsageError(
            f"--parts must be among {', '.join(suites.PARTS)}: got {', '.join(unknown)}"
        )
    if not all(length.isdigit() and int(length) for length in _LENGTHS.value):
        raise common.UsageError(
            f"--lengths must be positive numbers of tokens: got {','.join(_LENGTHS.value)}"
        )
    limits = suites.Limits(
        n_runs=_N_RUNS.value,
        max_seconds=_MAX_SECONDS.value,
        is_quick=_QUICK.value,
        lengths=tuple(map(int, _LENGTHS.value)),
    )
    if _SUITE.value == "decode":
        return decode_suite.decode_rows(config, limits)
    return suites.train_rows(config, limits, _PARTS.value)


def main(arguments: list[str]) -> None:
    """Measures, records, draws, prints."""
    del arguments
    rows_of_suite = measure(_CONFIG.value)
    from longctx_jax.benchmarking import figures, timing

    command = shlex.join(["python", "-m", "scripts.benchmark", *sys.argv[1:]])
    fields = timing.environment(command) | {"is_quick": _QUICK.value}
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
    print(figures.format_table(rows))
    for row in rows:
        if "speed_ratio" in row:
            print(
                f"{row['name']}: {row['speed_ratio']:.3f} tokens/s for tokens/s (quartiles "
                f"{row['speed_ratio_quartile_1']:.3f} to {row['speed_ratio_quartile_3']:.3f})"
            )
    picture = out.with_suffix(".png")
    figures.draw_rows(timing.read_rows(out)).savefig(picture)
    print(f"wrote {len(rows)} rows to {out}, and {picture}")
    if fields["platform"] == "cpu":
        print("these are CPU timings: they show that things run, not which method is faster")


if __name__ == "__main__":
    common.run(main)
