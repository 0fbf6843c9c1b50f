"""Charts as SVG to put into a page: lines of runs, told apart by colour and dashes.

A chart holds no text that comes from a run's folder: the page's legend names the runs, and the
lines of run i have the class `run-i`. Text, axes and grid have the colour of the page's text, so a
chart follows a light or dark page.
"""

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from longctx_jax.figures.curves import LABELS, smooth, values
from longctx_jax.reporting.contexts import ContextCurve
from longctx_jax.reporting.runs import Run

# Readable on white and on near-black.
COLORS = (
    *("#2f7ed8", "#e8710a", "#109e6c", "#d93a3a", "#9457d6"),
    *("#b58900", "#0c9ab0", "#dd4f9c", "#6a9a1f", "#94705a"),
)
DASHES = ("", "6 3", "2 2", "8 3 2 3")  # further runs repeat the colours with these
MAX_POINTS = 400  # of a curve; more are averaged
WIDE, HALF = (10.0, 4.0), (5.6, 3.2)  # inches
_TEXT_COLOR = "#010203"  # stands for the page's text colour
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": _TEXT_COLOR,
    "axes.labelcolor": _TEXT_COLOR,
    "xtick.color": _TEXT_COLOR,
    "ytick.color": _TEXT_COLOR,
    "text.color": _TEXT_COLOR,
    "grid.color": _TEXT_COLOR,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve of a run; the style is strong, light, or points joined by a line."""

    xs: np.ndarray
    ys: np.ndarray
    run: int
    style: str = "strong"


def color(index: int) -> str:
    """The colour of run `index`."""
    return COLORS[index % len(COLORS)]


def dashes(index: int) -> str:
    """The dash pattern of run `index`, as in SVG; "" = a solid line."""
    return DASHES[index // len(COLORS) % len(DASHES)]


def training_chart(runs: Sequence[Run], x: str, y: str, size: tuple[float, float]) -> str:
    """Training curves (light, with their moving average) and evaluations (points); "" if none.

    Args:
        runs: all runs of the report; those without `y` draw nothing.
        x: step, tokens or seconds.
        y: bits_per_byte, with evaluations of the same name, or loss, with those of nats_per_token.
        size: width and height in inches.
    """
    evaluation = "eval/bits_per_byte" if y == "bits_per_byte" else "eval/nats_per_token"
    lines = []
    for index, run in enumerate(runs):
        if run.is_bytes != (y == "bits_per_byte"):
            continue
        xs, ys = values(run.records, x, y)
        window = len(ys) // 25
        lines.append(Line(xs, ys, index, "light"))
        if window > 1:
            lines.append(Line(xs, smooth(ys, window), index, "middle"))
        lines.append(Line(*values(run.records, x, evaluation), index, "points"))
    return line_chart(lines, x, LABELS[y], size, is_zoomed=True)


def metric_chart(runs: Sequence[Run], x: str, y: str, size: tuple[float, float]) -> str:
    """One line a run of any recorded metric, from zero; "" if no run has it."""
    lines = [Line(*values(run.records, x, y), index) for index, run in enumerate(runs)]
    return line_chart(lines, x, LABELS.get(y, ""), size)


def context_chart(curves: Sequence[tuple[ContextCurve, int]], size: tuple[float, float]) -> str:
    """Bits per byte by context length, of curves with the number that sets their colour."""
    lines = []
    for curve, index in curves:
        lengths, bits = np.asarray(curve.points, float).T
        lines.append(Line(lengths, bits, index, "points"))
    return line_chart(lines, "context", LABELS["bits_per_byte"], size, is_zoomed=True, is_log=True)


def line_chart(
    lines: Sequence[Line],
    x: str,
    y_label: str,
    size: tuple[float, float],
    *,
    is_zoomed: bool = False,
    is_log: bool = False,
) -> str:
    """The lines as SVG; "" if they have no points.

    Args:
        lines: to draw, the first ones lowest.
        x: what the horizontal axis is; step, tokens, seconds or context.
        y_label: of the vertical axis.
        size: width and height in inches.
        is_zoomed: leaves the first, far larger values outside; otherwise the axis starts at 0.
        is_log: whether x doubles from tick to tick.
    """
    lines = [line for line in lines if len(line.xs)]
    if not lines:
        return ""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for line in lines:
            _draw(axes, line)
        if is_zoomed:
            axes.set_ylim(*_zoomed(lines))
        else:
            axes.set_ylim(bottom=min(0.0, *(line.ys.min() for line in lines)))
            axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if is_log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set_xlabel("context (tokens)" if x == "context" else LABELS[x])
        axes.set_ylabel(y_label)
        return _svg(figure)


def thinned(xs: np.ndarray, ys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` points: averages of neighbours where there are more."""
    if len(xs) <= MAX_POINTS:
        return xs, ys
    groups = zip(np.array_split(xs, MAX_POINTS), np.array_split(ys, MAX_POINTS), strict=True)
    x_means, y_means = zip(*((x.mean(), y.mean()) for x, y in groups), strict=True)
    return np.asarray(x_means), np.asarray(y_means)


def _draw(axes: Axes, line: Line) -> None:
    styles: dict[str, dict[str, Any]] = {
        "strong": {"linewidth": 1.6},
        "middle": {"linewidth": 1.4, "alpha": 0.65},
        "light": {"linewidth": 1, "alpha": 0.35},
        "points": {"linewidth": 1.8, "marker": "o", "markersize": 4},
    }
    pattern = [float(length) for length in dashes(line.run).split()]
    (artist,) = axes.plot(
        *thinned(line.xs, line.ys),
        color=color(line.run),
        linestyle=(0, pattern) if pattern else "-",
        **styles[line.style],
    )
    artist.set_gid(f"run-{line.run}")


def _zoomed(lines: Sequence[Line]) -> tuple[float, float]:
    """Limits of the vertical axis for which the first tenth of training curves does not count."""
    counted = [
        line.ys
        if line.style == "points"
        else line.ys[min(-(-len(line.ys) // 10), len(line.ys) - 1) :]
        for line in lines
    ]
    low, high = min(ys.min() for ys in counted), max(ys.max() for ys in counted)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _svg(figure: Figure) -> str:
    """The figure as an element for a page: scalable, and without ids that others may have."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_TEXT_COLOR, "currentColor")
    text = re.sub(
        r"<style.*?</style>|<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL
    )
    text = re.sub(r'<g id="(run-\d+)"', r'<g class="\1"', text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text)
    )
