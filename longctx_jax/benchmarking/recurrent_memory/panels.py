"""Panels of the suite `memory`: time, memory and ratios by length, time of a diagonal, drift."""

from typing import Any

from longctx_jax.figures.panels import Group, Lines
from longctx_jax.figures.style import Flat, Rows

LOOKS: dict[str, dict[str, Any]] = {
    "full attention": {"color": "0.4", "linestyle": ":", "marker": "v"},
    "armt sequential": {"color": "C1", "linestyle": "--", "marker": "s"},
    "armt diagonal": {"color": "C0", "linestyle": "-", "marker": "o"},
    "ideal even load": {"color": "k", "linestyle": "-.", "marker": ""},
}


def panels(rows: Rows) -> list[Group]:
    """Returns a group a shape and length of segments, and one of what is left."""
    found: list[Group] = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        here = [row for row in rows if row["shape"] == shape]
        for length in sorted({r["segment_len"] for r in here if "n_memory_tokens" in r}):
            found.append(_by_length(here, shape, length))
        found.append(_rest(here, shape))
    return found


def _by_length(rows: Rows, shape: str, length: int) -> Group:
    ours = {length} | {r["seq_len"] for r in rows if r["name"] == "full attention"}
    some = [r for r in rows if r.get("segment_len") in ours and r["part"] == "lengths"]
    times = [row for row in some if "speed_ratio" not in row]
    ratios = [row for row in some if "speed_ratio" in row]
    planned = [row for row in times if row["name"] != "ideal even load"]
    other = "times as fast is the diagonal order"
    lines = [
        Lines("time", times, "seq_len", "median_ms", _name, _look),
        Lines("memory", planned, "seq_len", "peak_bytes", _name, _look),
        Lines("kernels and copies started", times, "seq_len", "launches", _name, _look),
        Lines("ratio to the others", ratios, "seq_len", "speed_ratio", _name, _look, y_label=other),
    ]
    return Group(lines, f"prefill in one call, {shape}, segments of {length}")


def _rest(rows: Rows, shape: str) -> Group:
    parts = {part: [r for r in rows if r["part"] == part] for part in ("long", "groups", "drift")}
    lines = [
        Lines("prefill in pieces: time", parts["long"], "seq_len", "median_ms", _name, _look),
        Lines("prefill in pieces: memory", parts["long"], "seq_len", "peak_bytes", _name, _look),
        Lines("one diagonal", parts["groups"], "n_cells", "cell_ms", _name),
        Lines("bfloat16: the orders' drift", parts["drift"], "n_segments", "relative_error", _name),
    ]
    return Group(lines, f"other measurements, {shape}")


def _name(row: Flat) -> str:
    if row["part"] == "groups":
        return f"segments of {row['segment_len']}"
    return row.get("other", row["name"])


def _look(row: Flat) -> dict[str, Any]:
    return LOOKS.get(_name(row), {"marker": "o"})
