"""Panels of the suite `memory`: time, memory and ratios by length, time of a diagonal, drift."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]
Panel = tuple[str, Callable[[Axes], None]]
STYLES: dict[str, dict[str, Any]] = {
    "full attention": {"color": "0.4", "linestyle": ":", "marker": "v"},
    "armt sequential": {"color": "C1", "linestyle": "--", "marker": "s"},
    "armt diagonal": {"color": "C0", "linestyle": "-", "marker": "o"},
    "ideal even load": {"color": "k", "linestyle": "-.", "marker": ""},
}
LABELS = {
    "seq_len": "tokens",
    "n_cells": "cells of a diagonal",
    "n_segments": "segments",
    "median_ms": "ms",
    "peak_bytes": "memory of a call (bytes)",
    "speed_ratio": "time of the other / time of the diagonal order",
    "cell_ms": "ms a cell",
    "relative_error": "relative L2 distance of logits",
    "launches": "launches",
}


def panels(rows: Rows) -> list[Panel]:
    """Returns (title, what draws it) for the rows of one device; only for what was measured."""
    found: list[Panel] = []
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    for shape in shapes:
        here = [row for row in rows if row["shape"] == shape]
        for length in sorted({r["segment_len"] for r in here if "n_memory_tokens" in r}):
            ours = {length} | {r["seq_len"] for r in here if r["name"] == "full attention"}
            some = [r for r in here if r.get("segment_len") in ours and r["part"] == "lengths"]
            title = f"{shape}, segments of {length}"
            for y in ("median_ms", "peak_bytes", "launches", "speed_ratio"):
                drawn = [
                    r for r in some if r.get(y) and (y != "peak_bytes" or "even" not in r["name"])
                ]
                _add(found, title, drawn, "seq_len", y)
        for y in ("median_ms", "peak_bytes"):
            _add(found, f"{shape}, in pieces", _part(here, "long"), "seq_len", y)
        _add(found, f"{shape}, one diagonal", _part(here, "groups"), "n_cells", "cell_ms")
        _add(found, f"{shape}, bfloat16", _part(here, "drift"), "n_segments", "relative_error")
    return found


def _part(rows: Rows, part: str) -> Rows:
    return [row for row in rows if row["part"] == part]


def _add(found: list[Panel], title: str, rows: Rows, x: str, y: str) -> None:
    rows = [row for row in rows if row.get(y)]
    if rows:
        found.append((title, lambda axes: _lines(axes, rows, x, y)))


def _lines(axes: Axes, rows: Rows, x: str, y: str) -> None:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = row.get("other", row["name"])
        if row["part"] == "groups":
            name = f"segments of {row['segment_len']}"
        lines.setdefault(name, []).append(row)
    for name, members in lines.items():
        points = sorted((row[x], row[y]) for row in members)
        style = STYLES.get(name, {"marker": "o"})
        axes.plot(*zip(*points, strict=True), label=name, markersize=4, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("linear" if y == "speed_ratio" else "log")
    if y == "speed_ratio":
        axes.axhline(1.0, color="0.7", linewidth=1, zorder=0)
    axes.set_xlabel(LABELS[x])
    axes.set_ylabel(LABELS[y])
    axes.legend(fontsize=7)
