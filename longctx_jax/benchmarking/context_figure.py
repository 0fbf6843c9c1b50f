"""Figure of scripts.context: bits per byte by context length, and by position in the stripe."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from longctx_jax.benchmarking.plots import MAX_INSIDE_LEGEND, N_COLORS, Records

Label = Callable[[Mapping[str, Any]], str]
Points = dict[int, list[float]]  # values of the seeds by the tokens they are drawn at


def draw_context_curves(rows: Records) -> Figure:
    """Bits per byte by context length, a panel a text, a line a model; bars from seed to seed.

    Where rows tell positions, a second panel of the text shows those of each model's longest
    context, every interval at its end.

    Args:
        rows: of scripts.context: data, pattern, decay_kind, context_len, bits_per_byte,
            train_seq_len; of models with quantised keys also vq_codebook_size, vq_use_table, gate;
            model, n_layers, n_kv_heads and variant where they tell models apart; position_edges
            and bits_per_byte_by_position.

    Raises:
        ValueError: if there are no rows.
    """
    if not rows:
        raise ValueError("a context figure needs rows: got none; run scripts.context")
    panels: list[tuple[Records, Callable[[Records], Points], str]] = []
    for text in dict.fromkeys(row["data"] for row in rows):
        of_text = [row for row in rows if row["data"] == text]
        panels.append((of_text, _by_context, "context (tokens)"))
        if any("position_edges" in row for row in of_text):
            panels.append((of_text, _by_position, "position, up to (tokens)"))
    sizes = [f for f in ("n_layers", "n_kv_heads") if len({row.get(f) for row in rows}) > 1]
    label_of: Label = functools.partial(_context_label, sizes=sizes)
    if _has_twins(rows, label_of):  # e.g. one model trained in several ways: the runs' own names
        label_of = operator.itemgetter("run")
    labels = list(dict.fromkeys(map(label_of, rows)))
    width = 5.2 * len(panels)
    figure = Figure(figsize=(width, 4.2), layout="constrained", dpi=120)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (of_text, points_of, name) in zip(all_axes, panels, strict=True):
        for color, label in enumerate(labels):
            points = points_of([row for row in of_text if label_of(row) == label])
            _draw_model(axes, points, label, color)
        for window in sorted({row["train_seq_len"] for row in rows}):
            axes.axvline(window, color="0.6", linestyle=":", label=f"training window {window:,}")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
        axes.set_title(of_text[0]["data"], fontsize=10)
        axes.set_xlabel(name)
        axes.set_ylabel("bits per byte")
        axes.grid(alpha=0.3)
        if len(labels) <= MAX_INSIDE_LEGEND:
            axes.legend(fontsize=8)
    if len(labels) > MAX_INSIDE_LEGEND:
        figure.set_size_inches(width + 4.5, 4.2)
        handles = all_axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right upper", fontsize=8)
    return figure


def _draw_model(axes: Axes, points: Points, label: str, color: int) -> None:
    """Draws a line through the means, bars from the least to the greatest."""
    lengths = sorted(points)
    mean = [sum(points[n]) / len(points[n]) for n in lengths]
    low = [m - min(points[n]) for m, n in zip(mean, lengths, strict=True)]
    high = [max(points[n]) - m for m, n in zip(mean, lengths, strict=True)]
    style = "o-" if color < N_COLORS else "s--"
    axes.plot(lengths, mean, style, color=f"C{color}", label=label)
    if any(len(values) > 1 for values in points.values()):
        axes.errorbar(lengths, mean, yerr=[low, high], fmt="none", color=f"C{color}")


def _by_context(rows: Records) -> Points:
    points: Points = {}
    for row in rows:
        points.setdefault(row["context_len"], []).append(row["bits_per_byte"])
    return points


def _by_position(rows: Records) -> Points:
    """Returns the bits of each interval of the longest context, by the interval's end."""
    rows = [row for row in rows if "position_edges" in row]
    longest = max((row["context_len"] for row in rows), default=0)
    points: Points = {}
    for row in rows:
        if row["context_len"] == longest:
            ends, bits = row["position_edges"][1:], row["bits_per_byte_by_position"]
            for end, value in zip(ends, bits, strict=True):
                if value is not None:
                    points.setdefault(end, []).append(value)
    return points


def _has_twins(rows: Records, label_of: Label) -> bool:
    """Whether runs of one seed share a label, and all rows name their run."""
    if not all(row.get("run") for row in rows):
        return False
    runs: dict[tuple, set[str]] = {}
    for row in rows:
        runs.setdefault((row["data"], label_of(row), row["seed"]), set()).add(row["run"])
    return any(len(names) > 1 for names in runs.values())


def _context_label(row: Mapping[str, Any], sizes: Sequence[str]) -> str:
    if row.get("model") in ("stagformer", "inattention"):
        changed = [f"{name}={value}" for name, value in row["variant"].items()]
        return ", ".join([row["model"], *changed])
    kinds = list(dict.fromkeys(row["pattern"]))
    name = "-".join(row["pattern"]) if len(kinds) > 1 else kinds[0]
    told = [row["decay_kind"]] if row["decay_kind"] else []
    if "vq_codebook_size" in row:  # without the table no codes are seen
        told.append(f"{row['vq_codebook_size']} codes" if row["vq_use_table"] else "window only")
        if row["gate"] != "none":
            told.append("gated")
    if not row.get("train_carries_cache", True):
        told.append("trained in cold windows")
    told += [f"{row[field]} {field.removeprefix('n_')}" for field in sizes if field in row]
    return f"{name} ({', '.join(told)})" if told else name
