"""Panels of the suite `decay`: time, fraction of the roofline, and memory by sequence length.

Of the shapes in a file the one with the most lengths is drawn. Ours are lines, exact attention is
dotted, other libraries are dashed; a form has one colour in every panel.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from longctx_jax.benchmarking.decay_summary import WIDTHS

Rows = Sequence[Mapping[str, Any]]
Panel = tuple[str, Callable[[Axes], None]]
LABELS = {
    "median_ms": "time of a call (ms)",
    "roofline_fraction": "least possible time / time",
    "peak_bytes": "memory of a call (bytes)",
}


def panels(rows: Rows) -> list[Panel]:
    """Returns (title, what draws it) for the timed rows of one device."""
    rows = main_rows([row for row in rows if "median_ms" in row])
    if not rows:
        return []
    names = sorted(dict.fromkeys(row["name"] for row in rows), key=_order)
    shape = "batch {batch_size}, {n_heads} heads of {d_key}, {dtype}".format(**rows[0])
    wanted = [
        (f"forward: {shape}", "forward", "median_ms"),
        ("forward and backward", "forward_backward", "median_ms"),
        ("forward, against the roofline", "forward", "roofline_fraction"),
        ("memory, forward and backward", "forward_backward", "peak_bytes"),
    ]
    found: list[Panel] = []
    for title, kind, field in wanted:
        chosen = [row for row in rows if row["pass"] == kind and row.get(field)]
        if chosen:
            found.append((title, _drawer(chosen, names, field)))
    if found:  # one legend for all, right of the last panel
        title, draw = found[-1]
        found[-1] = (title, lambda axes: _with_legend(axes, draw, names))
    return found


def main_rows(rows: Rows) -> Rows:
    """Returns the rows with constant decays of the shape that was measured at the most lengths."""
    shapes: dict[tuple, set[int]] = {}
    for row in rows:
        if not row.get("is_per_token"):
            shapes.setdefault(_shape(row), set()).add(row["seq_len"])
    if not shapes:
        return []
    main = max(shapes, key=lambda shape: len(shapes[shape]))  # the first of equals
    return [row for row in rows if _shape(row) == main]


def _shape(row: Mapping[str, Any]) -> tuple:
    return tuple(row.get(name) for name in WIDTHS)


def _order(name: str) -> tuple[int, str]:
    return _kind(name), name


def _kind(name: str) -> int:
    """0 ours, 1 exact attention, 2 another library."""
    if name.startswith("softmax "):
        return 1
    return 2 if name.startswith(("fla ", "leet ")) else 0


def _style(name: str, names: Sequence[str]) -> dict[str, Any]:
    same = [other for other in names if _kind(other) == _kind(name)]
    color = f"C{same.index(name) % 10}" if _kind(name) != 1 else str(0.15 + 0.25 * same.index(name))
    marker = "osv^D<>Pd*X"[same.index(name) % 11]
    return {"color": color, "linestyle": ("-", ":", "--")[_kind(name)], "marker": marker}


def _drawer(rows: Rows, names: Sequence[str], field: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for name in names:
            points = sorted((r["seq_len"], r[field]) for r in rows if r["name"] == name)
            if points:
                style = _style(name, names)
                axes.plot(*zip(*points, strict=True), label=name, markersize=4, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("tokens a row")
        axes.set_ylabel(LABELS[field])

    return draw


def _with_legend(axes: Axes, draw: Callable[[Axes], None], names: Sequence[str]) -> None:
    draw(axes)
    for name in names:
        if name not in axes.get_legend_handles_labels()[1]:
            axes.plot([], [], label=name, markersize=4, **_style(name, names))
    axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=8)
