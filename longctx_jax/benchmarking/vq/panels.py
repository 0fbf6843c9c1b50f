"""Panels of the suite `vq`: speed, memory and ratios by length; codes, blocks; models; decoding.

Of the layer's rows: a colour a head type, a line style a form. The published implementation has a
panel of its own, with ours in black.
"""

from collections.abc import Callable, Sequence
from typing import Any

from longctx_jax.figures.panels import Group, Lines
from longctx_jax.figures.style import Flat, Rows

PEER = "published "
OURS = ("auto", "linear")
TRAINING = ("forward_backward", "train")


def panels(rows: Rows) -> list[Group]:
    """Returns the groups: a layer, the published one, its variants, models, decoding."""

    def of(*parts: str, kinds: Sequence[str] = TRAINING) -> Rows:
        return [r for r in rows if r.get("part") in parts and r.get("pass") in kinds]

    layer = [row for row in of("layer") if not _other(row).startswith(PEER)]
    lengths = {row.get("seq_len") for row in layer}
    layer += [row for row in of("slope") if row.get("seq_len", 0) not in lengths | {0}]
    decode = of("decode", kinds=("loop",))
    variants = [
        Lines(f"by {name}", of(part, kinds=("forward", "forward_backward")), field, y, _pass, look)
        for part, name, field, y, look in (
            ("codes", "codes", "n_codes", "relative_time", _pass_look),
            ("blocks", "block length", "block_len", "relative_time", _pass_look),
        )
    ]
    return [
        Group(_by_head(layer), "one layer, forward and backward"),
        Group(
            [*_published(layer, of("layer")), *variants],
            "the gated layer: the published ones, other sizes",
        ),
        Group(_by_head(of("model")), "one update of a model"),
        Group(
            [
                Lines("a token", decode, "context_len", "token_ms", _name, _decode_look),
                Lines("the state", decode, "context_len", "cache_bytes", _name, _decode_look),
            ],
            "decoding after a long context",
        ),
    ]


def _by_head(rows: Rows) -> list[Lines]:
    times = [row for row in rows if "speed_ratio" not in row]
    ours = _ours(rows)
    ratios = [row for row in rows if "speed_ratio" in row and row.get("form") == ours]
    other = f"times as fast is {ours} as the other"
    return [
        Lines("speed", times, "seq_len", "tokens_per_s", _head_label, _head_look),
        Lines("memory", times, "seq_len", "peak_bytes", _head_label, _head_look),
        Lines("ratio", ratios, "seq_len", "speed_ratio", _head_label, _head_look, y_label=other),
    ]


def _published(layer: Rows, rows: Rows) -> list[Lines]:
    peers = [row for row in rows if row["name"].startswith(PEER) and row["head_type"] == "shga"]
    if not peers:
        return []
    ours = [r for r in layer if r.get("head_type") == "shga" and r["name"] in OURS]
    compared = [*ours, *peers]
    return [
        Lines(
            "forward and backward", compared, "seq_len", "tokens_per_s", _name, _peer_look(compared)
        )
    ]


def _other(row: Flat) -> str:
    """The case that a row is about: of a ratio, what ours is compared with."""
    return row.get("other", row["name"])


def _ours(rows: Rows) -> str:
    """The form that ratios are drawn of: what "auto" takes, where that was measured."""
    forms = {row.get("form") for row in rows}
    return next((form for form in OURS if form in forms), "")


def _name(row: Flat) -> str:
    return row["name"].removeprefix(PEER) if row["name"].startswith(PEER) else row["name"]


def _head_label(row: Flat) -> str:
    return f"{row['head_type']}, {_other(row)}"


def _head_look(row: Flat) -> dict[str, Any]:
    colors = {"shga": "C0", "mqa": "C1", "mha": "C2"}
    name = _other(row)
    styles = {"linear": ("-", "o"), "auto": ("-", "D"), "pallas_triton": ("-", "^")}
    styles |= {"quadratic": ("--", "s")}
    style, marker = styles.get(name, (":", "v"))
    return {"color": colors.get(row["head_type"], "0.4"), "linestyle": style, "marker": marker}


def _peer_look(rows: Rows) -> Callable[[Flat], dict[str, Any]]:
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"].startswith(PEER)))

    def style(row: Flat) -> dict[str, Any]:
        if row["name"] not in names:
            return {"color": "k", "linestyle": "-", "marker": "oD"[row["name"] == "auto"]}
        return {"color": f"C{names.index(row['name'])}", "linestyle": "--", "marker": "s"}

    return style


def _pass(row: Flat) -> str:
    return f"{row['name']}, {row['pass'].replace('_', ' and ')}"


def _pass_look(row: Flat) -> dict[str, Any]:
    style = "-" if row["pass"] == "forward_backward" else ":"
    return {"color": f"C{row['name'] == 'auto':d}", "linestyle": style, "marker": "o"}


def _decode_look(row: Flat) -> dict[str, Any]:
    is_full = row["name"].startswith("transformer")
    return _head_look(row) | {"linestyle": ":" if is_full else "-", "marker": "ov"[is_full]}
