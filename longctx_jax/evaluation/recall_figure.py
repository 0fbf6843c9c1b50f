"""The figure of recall accuracy: pure functions from the rows of scripts.recall, no files."""

import collections
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def draw_recall(rows: Rows) -> Figure:
    """Accuracy a task: above by distance in each model's longest rows, below by length of the row.

    Bars are 95 % intervals; dotted lines are the distances of training and chance, the dashed one
    is the trivial guess.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("a recall figure needs rows: got none; run scripts.recall")
    rows = newest(rows)
    tasks = list(dict.fromkeys(row["data"] for row in rows))
    labels = _labels(rows)
    figure = Figure(figsize=(7.0 * len(tasks), 7.0), layout="constrained", dpi=120)
    panels = figure.subplots(2, len(tasks), squeeze=False)
    for column, task in enumerate(tasks):
        own = [row for row in rows if row["data"] == task]
        above, below = panels[:, column]
        for color, (run, label) in enumerate(labels.items()):
            mine = [row for row in own if row["run"] == run]
            if not mine:
                continue
            longest = max(row["n_segments"] for row in mine)
            bins = [r for r in mine if r["n_segments"] == longest and not r["is_total"]]
            totals = [r for r in mine if r["is_total"]]
            name = f"{label}, rows of {longest}"
            _draw_line(above, bins, "distance_segments", f"C{color}", name)
            _draw_line(below, totals, "n_segments", f"C{color}", label)
        above.set_title(task, fontsize=10)
        above.set_xlabel("distance from question to fact (segments)")
        below.set_xlabel("segments before the question's")
        longest = max(row["n_segments"] for row in own)
        bins = [r for r in own if r["n_segments"] == longest and not r["is_total"]]
        _draw_trivial(above, bins, "distance_segments")
        _draw_trivial(below, [r for r in own if r["is_total"]], "n_segments")
        trained = {above: "train_max_distance", below: "train_n_segments"}
        for axes, field in trained.items():
            _finish(axes, own, field)
    return figure


def newest(rows: Rows) -> list[Mapping[str, Any]]:
    """Returns the last row of each run, step, length and bin, in order of first appearance."""
    fields = ("data", "run", "step", "split", "n_segments", "distance_segments_min", "is_total")
    return list({tuple(str(row[name]) for name in fields): row for row in rows}.values())


def _labels(rows: Rows) -> dict[str, str]:
    """Returns a label a run: its model, and its name where several runs have that model."""
    models = {row["run"]: row["model"] for row in rows}
    n_runs = collections.Counter(models.values())
    return {
        run: model if n_runs[model] == 1 else f"{model} ({textwrap.shorten(run, 30)})"
        for run, model in models.items()
    }


def _draw_line(axes: Axes, rows: Rows, x: str, color: str, label: str) -> None:
    rows = sorted(rows, key=lambda row: row[x])
    middle = [row["accuracy"] for row in rows]
    errors = [
        [max(0.0, row["accuracy"] - row["accuracy_low"]) for row in rows],
        [max(0.0, row["accuracy_high"] - row["accuracy"]) for row in rows],
    ]
    points = [row[x] for row in rows]
    axes.errorbar(points, middle, yerr=errors, fmt="o-", color=color, label=label, capsize=2)


def _draw_trivial(axes: Axes, rows: Rows, x: str) -> None:
    """Rows of one length are the same for all runs; those recorded long ago have no such field."""
    points = sorted({row[x]: row["trivial"] for row in rows if "trivial" in row}.items())
    if points:
        label = "guess without the question"
        axes.plot(*zip(*points, strict=True), "--", color="0.6", label=label)


def _finish(axes: Axes, rows: Rows, trained: str) -> None:
    for place in sorted({row[trained] for row in rows}):
        axes.axvline(place, color="0.6", linestyle=":", label=f"training: {place}")
    for chance in sorted({row["chance"] for row in rows}):
        axes.axhline(chance, color="0.8", linestyle=":", label=f"chance: {chance:.3g}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share of right answers")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
