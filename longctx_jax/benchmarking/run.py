"""Runs a suite: measures, records every row at once, draws what the file holds, tells the rest."""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from longctx_jax.benchmarking import rows as rows_of
from longctx_jax.benchmarking.rows import Fields, Flat, Row
from longctx_jax.benchmarking.suite import Request, Suite
from longctx_jax.figures.panels import draw_groups
from longctx_jax.figures.saving import save

MEASURED = ("median_ms", "tokens_per_s")  # what every table shows, if rows have it
LAST = ("compile_s", "peak_bytes", "n_runs", "skipped")
LEFT_ALIGNED = ("name", "skipped")


def measure(
    name: str, suite: Suite, request: Request, environment: Fields, out: pathlib.Path
) -> Iterator[Row]:
    """Yields the rows of a suite; each one is in the file when it comes.

    Args:
        name: of the suite, in every case.
        suite: what to run.
        request: checked: see `suite.checked`.
        environment: of every row.
        out: JSON-lines file.
    """
    for row in rows_of.within(suite.rows(request), suite=name):
        whole = rows_of.make(row["case"], row["measured"], environment)
        rows_of.append(out, [whole])
        yield whole


def draw(suite: Suite, path: pathlib.Path, picture: pathlib.Path) -> None:
    """Draws the newest rows of a file.

    Raises:
        ValueError: if there is no row, or rows of several suites or devices.
    """
    recorded = rows_of.recorded(path)
    for field in ("suite", "device"):
        values = sorted({str(row.get(field)) for row in recorded})
        if len(values) != 1:
            raise ValueError(
                f"a benchmark figure needs rows of one {field}: got "
                f"{', '.join(values) or 'none'}; give each its own --out file"
            )
    save(draw_groups(suite.panels(recorded), recorded), picture, path)


def told(suite: Suite, rows: Sequence[Row]) -> list[str]:
    """Returns the table of rows, and the sentences about those that are about other rows."""
    sentences = [suite.summary(rows_of.flat(row)) for row in rows]
    plain = [row for row, text in zip(rows, sentences, strict=True) if not text]
    table = [format_table(plain, suite.columns)] if plain else []
    return table + [text for text in sentences if text]


def format_table(rows: Sequence[Row], columns: Sequence[str] = ()) -> str:
    """Returns rows as text in columns: their names, what else tells cases apart, what was measured.

    Args:
        rows: at least one.
        columns: measured fields besides those that all tables have.
    """
    measured = [*MEASURED, *columns, *LAST]
    names = [*_telling(rows), *(n for n in measured if any(n in row["measured"] for row in rows))]
    lines = [names] + [[_cell(rows_of.flat(row).get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in LEFT_ALIGNED else cell.rjust(width)
            for name, cell, width in zip(names, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _telling(rows: Sequence[Row]) -> list[str]:
    """Returns `name`, and the other fields of cases that have several values; no lists."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row["case"].items():
            if not isinstance(value, list | tuple | dict):
                values.setdefault(name, set()).add(json.dumps(value))
    return ["name", *(n for n, found in values.items() if len(found) > 1 and n != "name")]


def progress(row: Flat) -> str:
    """Returns one line about a flat row just measured."""
    if "median_ms" not in row:
        names = ("speed_ratio", "exponent", "relative_error", "skipped")
        return f"{row['name']}: {next((row[n] for n in names if n in row), '')}"
    where = " ".join(f"{n}={row[n]}" for n in ("pass", "batch_size", "seq_len") if n in row)
    speed = f", {row['tokens_per_s']:,.0f} tokens/s" if row.get("tokens_per_s") else ""
    return f"{row['name']} {where}: {row['median_ms']:.4g} ms{speed}"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if 0 < abs(value) < 1e-3:
            return f"{value:.1e}"
        return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
