"""Panels of the suite `vq`: speed, memory and ratios by length; codes, blocks; models; decoding.

Of the layer's rows: a colour a head type, a line style a form. The published implementation has a
panel of its own, with ours in black.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

Rows = Sequence[Mapping[str, Any]]
Panel = tuple[str, Callable[[Axes], None]]
LABELS = {
    "tokens_per_s": "tokens/s",
    "peak_bytes": "memory of a call (bytes)",
    "speed_ratio": "time of the other / time of the linear form",
    "relative_time": "time, relative to the published size",
    "token_ms": "ms a token",
    "cache_bytes": "memory of the state (bytes)",
    "seq_len": "tokens a row",
    "context_len": "context (tokens)",
    "n_codes": "codes",
    "block_len": "tokens a block",
}
PEER = "published "
OURS = ("auto", "linear")
TRAINING = ("forward_backward", "train")


def panels(rows: Rows) -> list[Panel]:
    """Returns (title, what draws it) for the rows of one device; only for what was measured."""
    found: list[Panel] = []

    def add(title: str, chosen: Rows, x: str, y: str, label: Callable, style: Callable) -> None:
        chosen = [row for row in chosen if row.get(y)]
        if chosen:
            found.append((title, lambda axes: _lines(axes, chosen, x, y, label, style)))

    def of(*parts: str, kinds: Sequence[str] = TRAINING) -> Rows:
        return [r for r in rows if r.get("part") in parts and r.get("pass") in kinds]

    layer = [row for row in of("layer") if not _other(row).startswith(PEER)]
    lengths = {row.get("seq_len") for row in layer}
    layer += [row for row in of("slope") if row.get("seq_len", 0) not in lengths | {0}]
    published = [row for row in of("layer") if _other(row).startswith(PEER)]
    ours = [r for r in layer if r.get("head_type") == "shga" and r["name"] in OURS]
    ratios = [r for r in layer if r.get("form") == _ours(layer)]
    by_head = (_head_label, _head_style)
    add("a layer, forward and backward", layer, "seq_len", "tokens_per_s", *by_head)
    add("memory, forward and backward", layer, "seq_len", "peak_bytes", *by_head)
    add("a layer: how many times as fast", ratios, "seq_len", "speed_ratio", *by_head)
    if published:
        compared = [*ours, *[r for r in published if r.get("head_type") == "shga"]]
        add(
            "gated layer and the published one",
            compared,
            "seq_len",
            "tokens_per_s",
            _name,
            _peer_style(compared),
        )
    for part, field in (("codes", "n_codes"), ("blocks", "block_len")):
        chosen = of(part, kinds=("forward", "forward_backward"))
        add(f"gated layer, by {LABELS[field]}", chosen, field, "relative_time", _pass, _pass_style)
    model = of("model")
    add("an update of a model", model, "seq_len", "tokens_per_s", *by_head)
    model = [row for row in model if row.get("form") == _ours(model)]
    add("a model: how many times as fast", model, "seq_len", "speed_ratio", *by_head)
    decode = of("decode", kinds=("loop",))
    add("decoding", decode, "context_len", "token_ms", _name, _decode_style)
    add("memory of decoding", decode, "context_len", "cache_bytes", _name, _decode_style)
    return found


def _other(row: Mapping[str, Any]) -> str:
    """The case that a row is about: of a ratio, what ours is compared with."""
    return row.get("other", row["name"])


def _ours(rows: Rows) -> str:
    """The form that ratios are drawn of: what "auto" takes, where that was measured."""
    forms = {row.get("form") for row in rows}
    return next((form for form in OURS if form in forms), "")


def _name(row: Mapping[str, Any]) -> str:
    return row["name"].removeprefix(PEER) if row["name"].startswith(PEER) else row["name"]


def _head_label(row: Mapping[str, Any]) -> str:
    return f"{row['head_type']}, {_other(row)}"


def _head_style(row: Mapping[str, Any]) -> dict[str, Any]:
    colors = {"shga": "C0", "mqa": "C1", "mha": "C2"}
    name = _other(row)
    styles = {"linear": ("-", "o"), "auto": ("-", "D"), "pallas_triton": ("-", "^")}
    styles |= {"quadratic": ("--", "s")}
    style, marker = styles.get(name, (":", "v"))
    return {"color": colors.get(row["head_type"], "0.4"), "linestyle": style, "marker": marker}


def _peer_style(rows: Rows) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"].startswith(PEER)))

    def style(row: Mapping[str, Any]) -> dict[str, Any]:
        if row["name"] not in names:
            return {"color": "k", "linestyle": "-", "marker": "oD"[row["name"] == "auto"]}
        return {"color": f"C{names.index(row['name'])}", "linestyle": "--", "marker": "s"}

    return style


def _pass(row: Mapping[str, Any]) -> str:
    return f"{row['name']}, {row['pass'].replace('_', ' and ')}"


def _pass_style(row: Mapping[str, Any]) -> dict[str, Any]:
    style = "-" if row["pass"] == "forward_backward" else ":"
    return {"color": f"C{row['name'] == 'auto':d}", "linestyle": style, "marker": "o"}


def _decode_style(row: Mapping[str, Any]) -> dict[str, Any]:
    is_full = row["name"].startswith("transformer")
    return _head_style(row) | {"linestyle": ":" if is_full else "-", "marker": "ov"[is_full]}


def _length(n: int) -> str:
    """Returns 8k for 8192."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if n % unit == 0:
            return f"{n // unit}{name}"
    return str(n)


def _lines(axes: Axes, rows: Rows, x: str, y: str, label: Callable, style: Callable) -> None:
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(label(row), []).append(row)
    for name, members in lines.items():
        points = sorted((row[x], row[y]) for row in members)
        axes.plot(*zip(*points, strict=True), label=name, markersize=4, **style(members[0]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    places = sorted({row[x] for row in rows})
    axes.set_xticks(places, [_length(place) for place in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(LABELS[x])
    axes.set_ylabel(LABELS[y])
    if y in ("speed_ratio", "relative_time"):
        axes.axhline(1.0, color="0.7", linewidth=1, zorder=0)
        axes.yaxis.set_minor_locator(LogLocator(subs="all"))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:.2g}")
        axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.legend(fontsize=7)
