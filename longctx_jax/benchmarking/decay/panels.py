"""Panels of the suite `decay`: time, fraction of the roofline, and memory by sequence length.

Of the shapes in a file the one with the most lengths is drawn. Ours are lines, exact attention is
dotted, other libraries are dashed; a form has one colour in every panel.
"""

from collections.abc import Callable, Sequence
from typing import Any

from longctx_jax.benchmarking.decay.summary import WIDTHS
from longctx_jax.figures.panels import Group, Lines
from longctx_jax.figures.style import MARKERS, Flat, Rows


def panels(rows: Rows) -> list[Group]:
    """Returns one group: the passes' times, and what they could be at best."""
    rows = main_rows([row for row in rows if "median_ms" in row])
    if not rows:
        return []
    rows = sorted(rows, key=lambda row: (_kind(row["name"]), row["name"]))
    look = _look(list(dict.fromkeys(row["name"] for row in rows)))
    wanted = [
        ("forward", "forward", "median_ms"),
        ("forward and backward", "forward_backward", "median_ms"),
        ("forward, against the roofline", "forward", "roofline_fraction"),
        ("memory, forward and backward", "forward_backward", "peak_bytes"),
    ]
    found = []
    for title, kind, y in wanted:
        chosen = [row for row in rows if row["pass"] == kind and row.get(y)]
        found.append(Lines(title, chosen, "seq_len", y, lambda row: row["name"], look))
    shape = "batch {batch_size}, {n_heads} heads of {d_key}, {dtype}".format(**rows[0])
    return [Group(found, f"decay attention by length: {shape}")]


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


def _shape(row: Flat) -> tuple:
    return tuple(row.get(name) for name in WIDTHS)


def _kind(name: str) -> int:
    """0 ours, 1 exact attention, 2 another library."""
    if name.startswith("softmax "):
        return 1
    return 2 if name.startswith(("fla ", "leet ")) else 0


def _look(names: Sequence[str]) -> Callable[[Flat], dict[str, Any]]:
    def look(row: Flat) -> dict[str, Any]:
        kind = _kind(row["name"])
        place = [name for name in names if _kind(name) == kind].index(row["name"])
        color = str(0.15 + 0.25 * place) if kind == 1 else f"C{place % 10}"
        marker = MARKERS[place % len(MARKERS)]
        return {"color": color, "linestyle": ("-", ":", "--")[kind], "marker": marker}

    return look
