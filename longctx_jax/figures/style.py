"""What all pictures share: sizes, colours, curves, ticks, legends, and what they say of their rows.

No files are read, and no display or global pyplot state is touched.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from longctx_jax.units import bytes_text, number_text, tokens_text

Flat = Mapping[str, Any]  # a row's fields side by side
Rows = Sequence[Flat]

N_COLORS = 10  # of the cycle; further lines have another marker and are dashed
MAX_INSIDE = 4  # entries of a legend within the axes; more stand outside
MAX_TICKS = 9
MARKERS = "os^Dv<>PX*"
UNCOMMITTED = "recorded on an uncommitted tree"


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def colors(n: int) -> list[Any]:
    """Returns n colours that can be told apart."""
    name, places = ("tab10", np.arange(n)) if n <= N_COLORS else ("turbo", np.linspace(0, 0.95, n))
    return list(colormaps[name](places))


def look(index: int) -> dict[str, Any]:
    """Returns colour, marker and dashes of the line of that number."""
    again, place = divmod(index, N_COLORS)
    marker = MARKERS[(place + 3 * again) % len(MARKERS)]
    return {"color": f"C{place}", "marker": marker, "linestyle": ("-", "--", ":")[again % 3]}


def curve(points: Iterable[tuple[float, float]], name: str, x: str) -> tuple[list, list]:
    """Returns the points in order of x, as (xs, ys).

    Raises:
        ValueError: if two points have one x: two cases would be joined to a zigzag.
    """
    ordered = sorted(points)
    xs = [place for place, _ in ordered]
    twice = sorted({a for a, b in zip(xs, xs[1:], strict=False) if a == b})
    if twice:
        raise ValueError(
            f"a curve has one point at an x: {name!r} has several at {x}={twice[0]:g}; tell its "
            "cases apart, or remove the rows that should not be there"
        )
    return xs, [value for _, value in ordered]


def finish(axes: Axes, title: str = "", x: str = "", y: str = "") -> None:
    """Gives axes their title, labels and grid."""
    axes.set_title(title, fontsize=10)
    if x:
        axes.set_xlabel(x)
    if y:
        axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def log_places(axes: Axes, places: Iterable[float]) -> None:
    """Makes the x axis logarithmic, with a tick at each of the places (every other of many)."""
    found = sorted(set(places))
    shown = found[:: -(-len(found) // MAX_TICKS)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(shown, [tokens_text(place) for place in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def log_values(axes: Axes, text: Callable[[float], str] = number_text) -> None:
    """Makes the y axis logarithmic; where it spans less than a decade, steps between have ticks.

    Args:
        axes: with their curves.
        text: of a value; bytes have ticks at powers of 2.
    """
    if text is bytes_text:
        low, high = axes.get_ylim()
        if low > 0 and high < 4 * low:  # hardly a power of 2 in sight
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
            axes.set_ylim(bottom=0)
            return
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_locator(LogLocator(base=2, numticks=8))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
        return
    axes.set_yscale("log")
    formatter = FuncFormatter(lambda value, _: text(value))
    axes.yaxis.set_major_formatter(formatter)
    low, high = axes.get_ylim()
    is_narrow = low > 0 and math.log10(high / low) < 1.5
    if is_narrow:
        axes.yaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
        axes.yaxis.set_minor_formatter(formatter)
        axes.tick_params(axis="y", which="minor", labelsize=7)
    else:
        axes.yaxis.set_minor_formatter(NullFormatter())


def legend(
    figure: Figure | SubFigure, all_axes: Sequence[Axes], width: float, title: str | None = None
) -> None:
    """Draws one legend of all axes: inside the only axes if it is short, else below them.

    Args:
        figure: that holds the axes.
        all_axes: what is named alike is told once.
        width: of the figure, inches.
        title: of the legend.
    """
    entries: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    handles, labels = list(entries.values()), list(entries)
    longest = max(map(len, labels))
    if len(all_axes) == 1 and len(labels) <= MAX_INSIDE and longest <= 50:
        all_axes[0].legend(handles, labels, fontsize=8, title=title, framealpha=0.9)
        return
    n_columns = min(_n_columns(longest, width), len(labels))
    options = {"fontsize": 8, "title": title, "frameon": False}
    figure.legend(handles, labels, loc="outside lower center", ncols=n_columns, **options)


def legend_height(n_labels: int, longest: int, width: float) -> float:
    """Returns the inches that `legend` takes below axes."""
    return 0.2 * math.ceil(n_labels / _n_columns(longest, width)) + 0.15


def _n_columns(longest: int, width: float) -> int:
    return max(1, int(width / (0.55 + 0.075 * longest)))


def about(rows: Rows) -> str:
    """Returns where rows were recorded, in a line; and how many on an uncommitted tree."""

    def several(name: str, cut: int = 100) -> str:
        found = sorted({str(row[name])[:cut] for row in rows if row.get(name)})
        return ", ".join(found if len(found) < 4 else [found[0], "...", found[-1]])

    n_dirty = sum(str(row.get("revision", "")).endswith("-dirty") for row in rows)
    text = f"{several('device')}, jax {several('jax_version')}, {several('date', 10)}"
    text += f", revision {several('revision', 7)}" if several("revision") else ""
    return text + (f"; {n_dirty} of {len(rows)} rows {UNCOMMITTED}" if n_dirty else "")
