"""Recall accuracy by distance and by length: rows of scripts.recall, flat."""

import collections
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longctx_jax.figures import style
from longctx_jax.figures.style import Rows


def draw_recall(rows: Rows) -> Figure:
    """Accuracy a task: above by distance in each model's longest rows, below by length of the row.

    Bars are 95 % intervals; dotted lines are the distances of training and chance, the dashed one
    is the trivial guess.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("a recall figure needs rows: got none; run scripts.recall")
    tasks = list(dict.fromkeys(row["data"] for row in rows))
    labels = _labels(rows)
    extra = style.legend_height(len(labels) + 5, max(map(len, labels.values())), 7.0 * len(tasks))
    figure = style.new_figure(7.0 * len(tasks), 7.2 + extra)
    panels = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        own = [row for row in rows if row["data"] == task]
        above, below = panels[:, column]
        for number, (run, label) in enumerate(labels.items()):
            mine = [row for row in own if row["run"] == run]
            if not mine:
                continue
            totals = [r for r in mine if r["is_total"]]
            _draw_line(above, _longest_bins(mine), "distance_segments", number, label)
            _draw_line(below, totals, "n_segments", number, label)
        bins = _longest_bins(own)
        _draw_trivial(above, bins, "distance_segments")
        _draw_trivial(below, [r for r in own if r["is_total"]], "n_segments")
        title = f"{task}: in each model's longest rows"
        _finish(above, own, "train_max_distance", title, "distance to the fact (segments)")
        title = f"{task}: by length of the row"
        _finish(below, own, "train_n_segments", title, "segments before the question's")
    figure.suptitle(style.about(rows), fontsize=8)
    style.legend(figure, list(panels.flat), 7.0 * len(tasks))
    return figure


def _longest_bins(rows: Rows) -> Rows:
    longest = max(row["n_segments"] for row in rows)
    return [row for row in rows if row["n_segments"] == longest and not row["is_total"]]


def _labels(rows: Rows) -> dict[str, str]:
    """Returns a label a run: its model, and its name where several runs have that model."""
    models = {row["run"]: row["model"] for row in rows}
    n_runs = collections.Counter(models.values())
    return {
        run: model if n_runs[model] == 1 else f"{model} ({_told(run)})"
        for run, model in models.items()
    }


def _told(run: str) -> str:
    """Returns a run's name without what a sweep says of all runs."""
    fields = [field.removeprefix("model.") for field in run.split(",")]
    kept = [f for f in fields if not f.startswith(("d_ff=", "name=", "train."))]
    return ", ".join(kept or fields)[:50]


def _draw_line(axes: Axes, rows: Rows, x: str, number: int, label: str) -> None:
    points = {row[x]: row for row in rows}
    xs, middle = style.curve(((row[x], row["accuracy"]) for row in rows), label, x)
    ordered: list[Any] = [points[place] for place in xs]
    errors = [
        [max(0.0, row["accuracy"] - row["accuracy_low"]) for row in ordered],
        [max(0.0, row["accuracy_high"] - row["accuracy"]) for row in ordered],
    ]
    look = style.look(number)
    axes.errorbar(xs, middle, yerr=errors, label=label, capsize=2, markersize=4, **look)


def _draw_trivial(axes: Axes, rows: Rows, x: str) -> None:
    """Rows of one length are the same for all runs; those recorded long ago have no such field."""
    points = sorted({row[x]: row["trivial"] for row in rows if "trivial" in row}.items())
    if points:
        label = "guess without the question"
        axes.plot(*zip(*points, strict=True), "--", color="0.6", label=label)


def _finish(axes: Axes, rows: Rows, trained: str, title: str, x: str) -> None:
    for place in sorted({row[trained] for row in rows}):
        label = f"trained on {place} segments"
        axes.axvline(place, color="0.6", linestyle=":", label=label)
    for chance in sorted({row["chance"] for row in rows}):
        axes.axhline(chance, color="0.8", linestyle="-.", label=f"chance: {chance:.3g}")
    style.finish(axes, title, x, "share of right answers")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(-0.03, 1.03)
