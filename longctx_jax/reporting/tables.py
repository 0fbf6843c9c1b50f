"""The tables of a report: pure functions from runs to columns and cells.

A cell is a text, a number, a `RunCell` or None. Nothing here knows HTML.
"""

import collections
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longctx_jax.reporting.runs import Run

MAX_VALUE_CHARS = 300
STALL_PREFIXES = ("stall/", "step_time/")
MEMORY_PREFIX = "memory/"
MEMORY_ENDINGS = ("peak_bytes", "bytes_in_use")


@dataclasses.dataclass(frozen=True)
class RunCell:
    """A run, by its index in the report."""

    index: int


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells under column names; columns that no row fills are left out."""

    columns: tuple[Any, ...]
    rows: tuple[tuple[Any, ...], ...]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> "Table":
        """The table of dicts from column to cell, columns in order of first appearance."""
        columns = list(dict.fromkeys(column for row in rows for column in row))
        filled = [c for c in columns if any(not is_empty(row.get(c)) for row in rows)]
        return cls(tuple(filled), tuple(tuple(row.get(c) for c in filled) for row in rows))


def is_empty(cell: Any) -> bool:
    """Whether there is nothing to show: None, or nan."""
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def summary(runs: Sequence[Run]) -> Table:
    """A row a run: what it is, how far it came, what it reached and how fast."""
    rows = []
    for index, run in enumerate(runs):
        planned = run.config.get("train.n_steps")
        rows.append(
            {
                "run": RunCell(index),
                "model": value_text(run.config.get("model.name")),
                "data": value_text(run.config.get("data.name")),
                "parameters": run.n_parameters,
                "status": run.status,
                "steps": int(run.records[-1]["step"]) if run.records else None,
                "of": planned if isinstance(planned, int) else None,
                "tokens": run.last("tokens"),
                "bits per byte": final(run, "bits_per_byte"),
                "nats per token": None if run.is_bytes else final(run, "nats_per_token"),
                "training bits per byte": run.last("bits_per_byte"),
                "training loss": None if run.is_bytes else run.last("loss"),
                "tokens/s": tokens_per_s(run),
                "seconds": run.last("seconds"),
            }
        )
    return Table.of(rows)


def final(run: Run, name: str) -> float:
    """The result on the held-out split: of DONE.json, else of the last evaluation."""
    value = run.result.get(name, math.nan)
    return value if math.isfinite(value) else run.last(f"eval/{name}")


def tokens_per_s(run: Run) -> float:
    """The median speed; the first record, which compiles, counts only if it is alone."""
    speeds = [
        r["tokens_per_s"] for r in run.records if math.isfinite(r.get("tokens_per_s", math.nan))
    ]
    return statistics.median(speeds[1:] or speeds) if speeds else math.nan


def config_differences(runs: Sequence[Run]) -> Table:
    """The config fields in which runs with a config differ.

    A row a run, or, where more fields than runs differ, a row a field.
    """
    known = [(index, run) for index, run in enumerate(runs) if run.config]
    fields = differing([run.config for _, run in known])
    if len(fields) <= len(known):
        rows = [
            {"run": RunCell(i)} | {field: value_text(run.config.get(field)) for field in fields}
            for i, run in known
        ]
        return Table.of(rows if fields else [])
    columns = ("field", *(RunCell(i) for i, _ in known))
    cells = ((f, *(value_text(run.config.get(f)) for _, run in known)) for f in fields)
    return Table(columns, tuple(cells))


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields with different values among the configs that have them.

    A field that only some have, as configs of different versions do, is no difference by itself.
    """
    fields = dict.fromkeys(field for config in configs for field in config)
    kinds = {f: {json.dumps(c[f]) for c in configs if f in c} for f in fields}
    return [field for field in fields if len(kinds[field]) > 1]


def value_text(value: Any) -> str | None:
    """A config value as text; a number keeps all its digits."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]} [cut]"


def settings(run: Run) -> Table:
    """All config fields of a run."""
    return Table(
        ("field", "value"), tuple((name, value_text(value)) for name, value in run.config.items())
    )


def last_metrics(run: Run) -> Table:
    """The last value of everything a run recorded."""
    names = dict.fromkeys(name for record in run.records for name in record)
    return Table(("metric", "last value"), tuple((name, run.last(name)) for name in names))


def stalls(runs: Sequence[Run]) -> Table:
    """What runs recorded about stalls and step times: how often, and the worst."""
    return _extremes(runs, lambda name: name.startswith(STALL_PREFIXES))


def memory(runs: Sequence[Run]) -> Table:
    """What runs recorded about memory."""
    return _extremes(runs, is_memory)


def is_memory(name: str) -> bool:
    """Whether a metric counts bytes of memory."""
    return name.startswith(MEMORY_PREFIX) or name.endswith(MEMORY_ENDINGS)


def _extremes(runs: Sequence[Run], is_wanted: Callable[[str], bool]) -> Table:
    """A row a run and wanted metric: its median and its largest value."""
    rows = []
    for index, run in enumerate(runs):
        points = collections.defaultdict(list)
        for record in run.records:
            for name, value in record.items():
                if is_wanted(name) and math.isfinite(value):
                    points[name].append((value, int(record["step"])))
        for name, found in points.items():
            largest, step = max(found)
            rows.append(
                {
                    "run": RunCell(index),
                    "metric": name,
                    "records": len(found),
                    "median": statistics.median(value for value, _ in found),
                    "largest": largest,
                    "at step": step,
                }
            )
    return Table.of(rows)
