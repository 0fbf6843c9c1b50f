"""Training curves of runs, and the summary of a sweep, from recorded metrics.

Records are those of `longctx_jax.training.metrics`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from longctx_jax.figures import style

Records = Sequence[Mapping[str, Any]]

LABELS = {
    "step": "step (parameter updates)",
    "tokens": "training tokens",
    "seconds": "training time (s)",
    "loss": "loss (nats per token)",
    "bits_per_byte": "bits per byte",
    "nats_per_token": "nats per token",
    "tokens_per_s": "speed (tokens/s)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
}


def draw_training_curves(
    runs: Mapping[str, Records],
    *,
    x: str = "step",
    y: str = "bits_per_byte",
    panel: str = "tokens_per_s",
) -> Figure:
    """Training curves with evaluation points above, a second quantity below.

    Args:
        runs: records of each run, by the label it gets in the legend.
        x: key of the horizontal axis: step, tokens or seconds.
        y: key of the upper panel; evaluations are the records with `eval/<y>`.
        panel: key of the lower panel.

    Returns:
        The figure: each training curve is drawn light, its moving average strong, evaluations as
        points joined by a line.

    Raises:
        ValueError: if there is no run, or no record has `y` or `eval/<y>` together with `x`.
    """
    if not runs:
        raise ValueError("a plot needs at least one run: got none; name a run's work directory")
    for label, records in runs.items():
        if not any(len(values(records, x, key)[0]) for key in (y, f"eval/{y}")):
            keys = sorted({key for record in records for key in record})
            raise ValueError(
                f"run {label} must record {y} or eval/{y} against {x}: "
                f"it has {', '.join(keys) or 'no records'}; choose --x and --y among these"
            )
    figure = style.new_figure(9, 7)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
    colors = style.colors(len(runs))
    for color, (label, records) in zip(colors, runs.items(), strict=True):
        _draw_curve(above, records, x, y, color, label)
        below.plot(*values(records, x, panel), color=color, linewidth=1.2)
    _zoom(above, [values(r, x, key) for r in runs.values() for key in (y, f"eval/{y}")])
    above.set_ylabel(LABELS.get(y, y))
    below.set_ylabel(LABELS.get(panel, panel))
    below.set_xlabel(LABELS.get(x, x))
    if x == "tokens":
        below.xaxis.set_major_formatter(
            EngFormatter(sep="", places=0)
        )  # 2M rather than 0.2 and 1e7
    if panel == "tokens_per_s":
        below.yaxis.set_major_formatter(EngFormatter(sep="", places=0))
    if panel != "learning_rate":
        below.set_ylim(bottom=0)
    else:
        below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    style.finish(above)
    style.finish(below)
    _draw_legend(figure, above)
    return figure


def draw_sweep(rows: Sequence[Mapping[str, Any]], fields: Sequence[str], *, y: str) -> Figure:
    """The final result of each run of a sweep.

    With a numeric override of at least two values: lines against it, one a combination of the other
    overrides. Otherwise: one horizontal bar a run, best first.

    Args:
        rows: one a finished run: `run`, the overrides in `fields`, and `y`.
        fields: names of the overrides.
        y: the result, lower is better.

    Raises:
        ValueError: if no row has a finite `y`.
    """
    rows = [r for r in rows if isinstance(r.get(y), int | float) and math.isfinite(r[y])]
    if not rows:
        raise ValueError(f"a sweep plot needs a finished run with {y}: got none; see the logs")
    axis = _numeric_field(rows, fields)
    if axis:
        return _draw_sweep_lines(rows, axis, [f for f in fields if f != axis], y)
    rows = sorted(rows, key=lambda r: r[y])
    figure = style.new_figure(8, 1.6 + 0.35 * len(rows))
    axes = figure.subplots()
    bars = axes.barh([r["run"] for r in rows], [r[y] for r in rows], color="tab:blue", height=0.6)
    axes.bar_label(bars, fmt="%.4g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    style.finish(axes, x=LABELS.get(y, y))
    return figure


def values(records: Records, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """The finite points (x, y) of the records that have `y`, in order of step.

    A record that lacks `x` (evaluations need not repeat `tokens` or `seconds`) gets it by linear
    interpolation over the steps of those that have it.

    Returns:
        Two float arrays of one length.
    """
    ordered = sorted(records, key=lambda r: r["step"])
    known = [(r["step"], r[x]) for r in ordered if _is_number(r.get(x))]
    found = [r for r in ordered if _is_number(r.get(y))]
    if not known or not found:
        return np.zeros(0), np.zeros(0)
    steps, xs = np.asarray(known, float).T
    return (
        np.interp([r["step"] for r in found], steps, xs),
        np.asarray([r[y] for r in found], float),
    )


def smooth(points: np.ndarray, window: int) -> np.ndarray:
    """The centred moving average of `points`, over fewer points near the ends.

    Args:
        points: [n].
        window: points averaged; taken as odd.

    Returns:
        [n].
    """
    half = max(window, 1) // 2
    sums = np.concatenate([[0.0], np.cumsum(points)])
    index = np.arange(len(points))
    reach = np.minimum(half, np.minimum(index, len(points) - 1 - index))  # stays centred
    return (sums[index + reach + 1] - sums[index - reach]) / (2 * reach + 1)


def _draw_curve(axes: Axes, records: Records, x: str, y: str, color: Any, label: str) -> None:
    xs, ys = values(records, x, y)
    eval_xs, eval_ys = values(records, x, f"eval/{y}")
    window = len(ys) // 25
    if len(ys):
        axes.plot(xs, ys, color=color, alpha=0.25 if window > 1 else 0.5, linewidth=1)
    if window > 1:
        axes.plot(xs, smooth(ys, window), color=color, alpha=0.6, linewidth=1.4)
    text = f"{label}: {eval_ys[-1]:.3f}" if len(eval_ys) else label
    marker = "o" if len(eval_ys) else ""
    axes.plot(eval_xs, eval_ys, color=color, label=text, marker=marker, markersize=5, linewidth=2)


def _zoom(axes: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Keeps the first steps, far above the rest, from flattening the curve."""
    everything = np.concatenate([ys for _, ys in curves])
    low = everything.min()
    tops = [ys[len(ys) // 20 :].max() for _, ys in curves if len(ys)]
    high = max(tops)
    if high > low:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.08 * (high - low))


def _draw_legend(figure: Figure, axes: Axes) -> None:
    _, labels = axes.get_legend_handles_labels()
    longest = max(map(len, labels))
    if len(labels) > style.MAX_INSIDE or longest > 50:
        width, height = figure.get_size_inches()
        more = style.legend_height(len(labels), longest, width)
        figure.set_size_inches(width, height + more + 0.3)
    title = "run: last evaluation (dots); training is drawn light"
    style.legend(figure, [axes], figure.get_figwidth(), title)


def _draw_sweep_lines(
    rows: Sequence[Mapping[str, Any]], axis: str, others: Sequence[str], y: str
) -> Figure:
    others = [f for f in others if len({repr(r.get(f)) for r in rows}) > 1]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        name = ", ".join(f"{field}={row[field]}" for field in others if field in row)
        groups.setdefault(name, []).append(row)
    figure = style.new_figure(8, 5)
    axes = figure.subplots()
    for color, (name, members) in zip(style.colors(len(groups)), groups.items(), strict=True):
        points = style.curve(((r[axis], r[y]) for r in members), name or "the sweep", axis)
        axes.plot(*points, "o-", color=color, label=name)
    places = sorted({float(r[axis]) for r in rows})
    if places[0] > 0 and places[-1] / places[0] >= 8:
        axes.set_xscale("log")
    if len(places) <= style.MAX_TICKS:
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
    style.finish(axes, x=axis, y=LABELS.get(y, y))
    if any(groups):
        style.legend(figure, [axes], 8)
    return figure


def _numeric_field(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> str:
    """The numeric override with the most values, at least two; "" if there is none."""
    counts = {
        f: len({r[f] for r in rows}) for f in fields if all(_is_number(r.get(f)) for r in rows)
    }
    best = max(counts, key=lambda f: counts[f], default="")
    return best if best and counts[best] > 1 else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
