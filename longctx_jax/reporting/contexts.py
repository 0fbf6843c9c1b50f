"""Bits per byte by context length: rows of `scripts.context` found in or beside the runs.

Files are the `.jsonl` files of a run's folder, of the folder around it, and, for a run of a sweep,
of the folder around the sweep. A row that names its run (`run`) counts if exactly one run of the
report has that name; a row that names none, as older ones do, is told apart by its model.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longctx_jax import run_files
from longctx_jax.benchmarking.rows import KINDS, is_dirty
from longctx_jax.reporting import files
from longctx_jax.reporting.runs import Run
from longctx_jax.reporting.tables import RunCell, Table, value_text
from longctx_jax.training.sweep import PLAN_FILE

MAX_FILES = 50
MAX_FILE_BYTES = 8 * 2**20
MAX_CURVES = 200
MAX_LENGTHS = 20  # columns of the table
_OTHER_FILES = (run_files.METRICS, run_files.SAMPLES)


@dataclasses.dataclass(frozen=True)
class ContextCurve:
    """One model on one text: bits per byte by the most tokens it could look back on."""

    text: str  # data and split
    run: int | None  # index of the run, if the rows name it
    model: str  # of a curve without a run
    points: tuple[tuple[float, float], ...]  # context tokens, bits per byte; ascending
    is_dirty: bool = False  # whether a row was recorded on an uncommitted tree


def context_curves(runs: Sequence[Run]) -> list[ContextCurve]:
    """The curves of all rows found; of rows about the same thing the last counts."""
    points: dict[tuple[str, int | None, str], dict[float, float]] = {}
    dirty = set()
    for path in _row_files(runs):
        for line in files.read_lines(path, MAX_FILE_BYTES)[0]:
            row = _flat(line)
            length, bits = (
                files.number(row.get("context_len")),
                files.number(row.get("bits_per_byte")),
            )
            index = _run_of(row, path.parent, runs)
            if row.get("suite") != "context" or not length > 0 or math.isnan(bits) or index == -1:
                continue
            text = " ".join(filter(None, (value_text(row.get(k)) for k in ("data", "split"))))
            key = (text, index, "" if index is not None else _model(row))
            points.setdefault(key, {})[length] = bits
            dirty |= {key} if is_dirty(row) else set()
    curves = [
        ContextCurve(*key, tuple(sorted(found.items())), key in dirty)
        for key, found in points.items()
    ]
    return curves[:MAX_CURVES]


def context_table(curves: Sequence[ContextCurve]) -> Table:
    """A row a curve, a column a context length."""
    lengths = sorted({length for curve in curves for length, _ in curve.points})[:MAX_LENGTHS]
    rows = [
        {"run": curve.model if curve.run is None else RunCell(curve.run)}
        | {"text": curve.text + (", uncommitted tree" if curve.is_dirty else "")}
        | dict.fromkeys(f"{length:,.0f}" for length in lengths)
        | {f"{length:,.0f}": bits for length, bits in curve.points if length in lengths}
        for curve in curves
    ]
    return Table.of(rows)


def _row_files(runs: Sequence[Run]) -> list[pathlib.Path]:
    folders: dict[pathlib.Path, None] = {}
    for run in runs:
        folder = run.folder.resolve()
        folders |= {folder: None, folder.parent: None}
        if (folder.parent / PLAN_FILE).is_file():
            folders[folder.parent.parent] = None
    found = (path for folder in folders for path in sorted(folder.glob("*.jsonl")))
    return [path for path in found if path.name not in _OTHER_FILES][:MAX_FILES]


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a row side by side; {} of a line that is no row."""
    fields: dict[str, Any] = {}
    for kind in reversed(KINDS):  # of equal names the case's counts
        part = line.get(kind)
        if not isinstance(part, dict):
            return {}
        fields |= part
    return fields


def _run_of(row: Mapping[str, Any], folder: pathlib.Path, runs: Sequence[Run]) -> int | None:
    """The index of the row's run; None if the row names none, -1 if it is not in the report."""
    name = row.get("run")
    if name is None:
        return None
    below = (
        index
        for index, run in enumerate(runs)
        if run.folder.resolve().name == name and run.folder.resolve().is_relative_to(folder)
    )
    named = list(below)
    return named[0] if len(named) == 1 else -1


def _model(row: Mapping[str, Any]) -> str:
    return ", ".join(_told(row)) or "unnamed"


def _told(row: Mapping[str, Any]) -> Iterator[str]:
    """What tells the model of a row without a run from others."""
    for field in ("model", "pattern", "decay_kind", "variant", "vq_codebook_size", "seed"):
        value = row.get(field)
        if value not in (None, "", {}, []):
            yield f"{field} {value_text(value)}"
