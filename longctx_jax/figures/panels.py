"""Pictures of suites: lines and bars that a suite declares, drawn with one legend a group.

A suite says what to show (`Lines`, `Bars`); how it looks is here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longctx_jax.figures import style
from longctx_jax.figures.style import Flat, Rows
from longctx_jax.units import bytes_text, number_text

Label = Callable[[Flat], str]
LABELS = {
    "seq_len": "tokens a row",
    "context_len": "context (tokens)",
    "n_cells": "cells of a diagonal",
    "n_segments": "segments",
    "n_codes": "codes",
    "block_len": "tokens a block",
    "tokens_per_s": "tokens/s",
    "median_ms": "time (ms)",
    "token_ms": "time a token (ms)",
    "cell_ms": "time a cell (ms)",
    "peak_bytes": "memory of a call",
    "cache_bytes": "memory of the state",
    "roofline_fraction": "least possible time / time",
    "speed_ratio": "how many times as fast",
    "relative_time": "time, relative to the published size",
    "relative_error": "relative L2 distance of logits",
    "launches": "launches",
}
RATIOS = ("speed_ratio", "relative_time")  # a line at 1 says which side is which
PANEL_WIDTH, PANEL_HEIGHT = 5.0, 3.9  # inches
MAX_COLUMNS = 4


@dataclasses.dataclass(frozen=True)
class Lines:
    """One number by another, a line a label.

    Attributes:
        look: of a label: colour, marker, linestyle; None = as they come.
        is_log: the values' axis.
    """

    title: str
    rows: Rows
    x: str
    y: str
    label: Label
    look: Callable[[Flat], dict[str, Any]] | None = None
    is_log: bool = True
    y_label: str = ""


@dataclasses.dataclass(frozen=True)
class Bars:
    """A bar a row, with whiskers from quartile to quartile where there are some."""

    title: str
    rows: Rows
    label: Label
    value: str = "median_ms"
    x_label: str = "time (ms): median and quartiles"


@dataclasses.dataclass(frozen=True)
class Group:
    """Panels that stand together under one title and share a legend."""

    panels: Sequence[Lines | Bars]
    title: str = ""


def draw_groups(groups: Sequence[Group], rows: Rows) -> Figure:
    """Returns the figure of a suite; panels without a point are left out.

    Args:
        groups: as the suite declares them.
        rows: all of them, flat: what the title says.

    Raises:
        ValueError: if there is nothing to draw, or a curve has two points at one x.
    """
    kept = [Group([p for p in g.panels if _has_points(p)], g.title) for g in groups]
    kept = [group for group in kept if group.panels]
    if not kept:
        raise ValueError("a benchmark figure needs timed rows: got none; run the suite first")
    n_columns = min(MAX_COLUMNS, max(len(group.panels) for group in kept))
    width = PANEL_WIDTH * n_columns
    heights = [_height(group, n_columns, width) for group in kept]
    figure = style.new_figure(width, sum(heights) + 0.4)
    parts: Any = figure.subfigures(len(kept), 1, squeeze=False, height_ratios=heights)
    for part, group in zip(parts[:, 0], kept, strict=True):
        _draw_group(part, group, n_columns)
    figure.suptitle(style.about(rows), fontsize=9)
    return figure


def _has_points(panel: Lines | Bars) -> bool:
    value = panel.y if isinstance(panel, Lines) else panel.value
    return any(_is_drawn(row, value) for row in panel.rows)


def _is_drawn(row: Flat, value: str) -> bool:
    return row.get(value) is not None and row[value] == row[value]


def _places(panel: Lines) -> set[float]:
    return {row[panel.x] for row in panel.rows if _is_drawn(row, panel.y)}


def _at_one_place(panel: Lines, place: float) -> Bars:
    """Returns the bars that say what points above each other would."""
    title = f"{panel.title}, at {place:,g} {LABELS[panel.x]}"
    return Bars(title, panel.rows, panel.label, panel.y, panel.y_label or LABELS[panel.y])


def _labels(group: Group) -> list[str]:
    lines = (p for p in group.panels if isinstance(p, Lines) and len(_places(p)) > 1)
    drawn = (p.label(row) for p in lines for row in p.rows if _is_drawn(row, p.y))
    return list(dict.fromkeys(drawn))


def _height(group: Group, n_columns: int, width: float) -> float:
    labels = _labels(group)
    tall = [p for p in group.panels if isinstance(p, Bars)]
    panel = max([PANEL_HEIGHT, *(1.2 + 0.3 * len(p.rows) for p in tall)])
    height = panel * -(-len(group.panels) // n_columns) + (0.35 if group.title else 0.0)
    if labels:
        height += style.legend_height(len(labels), max(map(len, labels)), width)
    return height


def _draw_group(part: Any, group: Group, n_columns: int) -> None:
    n_rows = -(-len(group.panels) // n_columns)
    labels = _labels(group)
    looks = {label: style.look(number) for number, label in enumerate(labels)}
    all_axes = [part.add_subplot(n_rows, n_columns, i + 1) for i in range(len(group.panels))]
    for axes, panel in zip(all_axes, group.panels, strict=True):
        if isinstance(panel, Bars):
            _draw_bars(axes, panel)
        elif len(places := _places(panel)) == 1:
            _draw_bars(axes, _at_one_place(panel, places.pop()))
        else:
            _draw_lines(axes, panel, looks)
    if group.title:
        part.suptitle(group.title, fontsize=11)
    style.legend(part, all_axes, PANEL_WIDTH * n_columns)


def _draw_lines(axes: Axes, panel: Lines, looks: dict[str, dict[str, Any]]) -> None:
    lines: dict[str, list[Flat]] = {}
    for row in panel.rows:
        if _is_drawn(row, panel.y):
            lines.setdefault(panel.label(row), []).append(row)
    for name, members in lines.items():
        about = f"{panel.title}: {name}"
        points = style.curve(((row[panel.x], row[panel.y]) for row in members), about, panel.x)
        look = panel.look(members[0]) if panel.look else looks[name]
        axes.plot(*points, label=name, markersize=4, **look)
    style.finish(axes, panel.title, LABELS[panel.x], panel.y_label or LABELS[panel.y])
    style.log_places(axes, [row[panel.x] for members in lines.values() for row in members])
    values = [row[panel.y] for members in lines.values() for row in members]
    if panel.is_log and min(values) > 0:
        style.log_values(axes, bytes_text if panel.y.endswith("_bytes") else number_text)
    if panel.y in RATIOS:
        axes.axhline(1.0, color="0.7", linewidth=1, zorder=0)


def _draw_bars(axes: Axes, panel: Bars) -> None:
    rows = [row for row in panel.rows if _is_drawn(row, panel.value)]
    names = [panel.label(row) for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"a bar is of one row: {panel.title!r} has several called {twice[0]!r}; tell them apart"
        )
    middle = [row[panel.value] for row in rows]
    errors = [
        [m - row.get("quartile_1_ms", m) for m, row in zip(middle, rows, strict=True)],
        [row.get("quartile_3_ms", m) - m for m, row in zip(middle, rows, strict=True)],
    ]
    whiskers = {"xerr": errors, "ecolor": "0.3"} if panel.value == "median_ms" else {}
    bars = axes.barh(names, middle, color="tab:blue", height=0.6, **whiskers)
    axes.bar_label(bars, fmt="%.4g", padding=6, fontsize=8)
    axes.set_ylim(max(len(rows), 4) - 0.5, -0.5)
    axes.margins(x=0.18)
    if panel.value.endswith("_bytes"):
        axes.xaxis.set_major_formatter(lambda value, _: bytes_text(value))
    axes.tick_params(axis="y", labelsize=8)
    style.finish(axes, panel.title, panel.x_label)
