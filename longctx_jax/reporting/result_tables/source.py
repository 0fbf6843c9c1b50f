"""Rows of results/ for one table, and how their numbers are written."""

import functools
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longctx_jax.benchmarking import ratios
from longctx_jax.benchmarking.rows import Flat, is_dirty, recorded

Cells = Sequence[str]
MISSING = object()  # a value of `where`: the field is not there
NO_ROWS = "not recorded yet"


class Source:
    """The newest rows of files in a folder; remembers those that a table was made of."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.used: list[Flat] = []

    def rows(self, file: str, **where: Any) -> list[Flat]:
        """Returns the flat rows of results/<file>.jsonl whose fields have those values.

        A set of values stands for any of them; `MISSING` for a field that is not there.
        """
        found = [row for row in _read(self.folder / f"{file}.jsonl") if _fits(row, where)]
        self.used += found
        return found

    def one(self, file: str, **where: Any) -> Flat | None:
        """Returns the only such row; None if there is none.

        Raises:
            ValueError: if there are several: a table says one number of them.
        """
        found = self.rows(file, **where)
        if len(found) > 1:
            raise ValueError(
                f"a cell is of one row: results/{file}.jsonl has {len(found)} with {where}; say "
                "which"
            )
        return found[0] if found else None

    def note(self) -> str:
        """Returns what to say of rows that were recorded on an uncommitted tree, "" if none was."""
        n_dirty = sum(map(is_dirty, self.used))
        if not n_dirty:
            return ""
        share = "All" if n_dirty == len(self.used) else f"{n_dirty} of {len(self.used)}"
        return f"*{share} of these rows were recorded on an uncommitted tree.*"


@functools.cache
def _read(path: pathlib.Path) -> list[Flat]:
    return list(recorded(path)) if path.is_file() else []


def _fits(row: Flat, where: Mapping[str, Any]) -> bool:
    for name, value in where.items():
        if value is MISSING:
            if name in row:
                return False
        elif isinstance(value, set | frozenset):
            if row.get(name) not in value:
                return False
        elif row.get(name) != value:
            return False
    return True


def markdown(heads: Cells, lines: Sequence[Cells]) -> str:
    """Returns a table in Markdown."""
    ruler = ["---"] * len(heads)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ruler, *lines))


def number(row: Flat | None, field: str, text: str | Callable[[Any], str] = ".2f") -> str:
    """Returns a field of a row as text, "" where there is none."""
    if row is None or row.get(field) is None:
        return ""
    return text(row[field]) if callable(text) else format(row[field], text)


def ratio(row: Flat | None, name: str = ratios.SPEED) -> str:
    """Returns `1.31 (1.25 to 1.42)`: median and quartiles."""
    if row is None:
        return ""
    low, middle, high = (row[f"{name}{ending}"] for ending in ratios.QUARTILES)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def mean(rows: Sequence[Flat], field: str, *, each: bool = False, digits: int = 3) -> str:
    """Returns the mean of a field over rows of several seeds, "" without rows.

    Args:
        rows: at most one a seed.
        field: what to average.
        each: also tell the values, in the order of the seeds.
        digits: after the point.

    Raises:
        ValueError: if two rows have one seed.
    """
    seeds = [row.get("seed", 0) for row in rows]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a mean is over seeds: got {seeds} of {field}; say which rows")
    values = [row[field] for row in sorted(rows, key=lambda row: row.get("seed", 0))]
    if not values:
        return ""
    text = f"{statistics.fmean(values):.{digits}f}"
    if not each or len(values) == 1:
        return text
    return f"{text} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def ms(value: float) -> str:
    """Returns milliseconds with three digits: 0.25, 12.3, 1,984."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def decimal_bytes(value: float) -> str:
    """Returns bytes in powers of 1,000: 72 kB, 17.2 MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:,.0f} B"
