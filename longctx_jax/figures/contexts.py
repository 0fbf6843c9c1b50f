"""Bits per byte by context length, and by position in the stripe: rows of scripts.context."""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from longctx_jax.figures import style
from longctx_jax.figures.style import Rows

Label = Callable[[Mapping[str, Any]], str]
SIZES = {"n_layers": "layers", "n_kv_heads": "key heads"}
TELLING = (*SIZES, "train_carries_cache")  # told where rows differ in them
Points = dict[int, dict[Any, float]]  # values by the tokens they are drawn at, and by seed


def draw_context_curves(rows: Rows) -> Figure:
    """Bits per byte by context length, a panel a text, a line a model; bars from seed to seed.

    Where rows tell positions, a second panel of the text shows those of each model's longest
    context, every interval at its end.

    Args:
        rows: of scripts.context, flat: data, pattern, decay_kind, context_len, bits_per_byte,
            train_seq_len; of models with quantised keys also vq_codebook_size, vq_use_table, gate;
            model, n_layers, n_kv_heads and variant where they tell models apart; position_edges
            and bits_per_byte_by_position.

    Raises:
        ValueError: if there are no rows, or a model has two rows of one length and seed.
    """
    if not rows:
        raise ValueError("a context figure needs rows: got none; run scripts.context")
    panels: list[tuple[Rows, Callable[[Rows, str], Points], str, str]] = []
    for text in dict.fromkeys(row["data"] for row in rows):
        of_text = [row for row in rows if row["data"] == text]
        panels.append((of_text, _by_context, text, "context (tokens)"))
        if any("position_edges" in row for row in of_text):
            title = f"{text}: within the longest context"
            panels.append((of_text, _by_position, title, "position, up to (tokens)"))
    telling = [f for f in TELLING if len({row.get(f) for row in rows}) > 1]
    label_of: Label = functools.partial(_context_label, telling=telling)
    if _has_twins(rows, label_of):  # e.g. one model trained in several ways: the runs' own names
        label_of = operator.itemgetter("run")
    labels = list(dict.fromkeys(map(label_of, rows)))
    windows = sorted({row["train_seq_len"] for row in rows})
    longest = max(map(len, [*labels, f"training window {windows[-1]:,}"]))
    width = max(8.0, 5.4 * len(panels))
    extra = style.legend_height(len(labels) + len(windows), longest, width)
    figure = style.new_figure(width, 4.2 + extra)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (of_text, points_of, title, name) in zip(all_axes, panels, strict=True):
        places = set(windows)
        for number, label in enumerate(labels):
            points = points_of([row for row in of_text if label_of(row) == label], label)
            places |= set(points)
            _draw_model(axes, points, label, number)
        for window in windows:
            axes.axvline(window, color="0.6", linestyle=":", label=f"training window {window:,}")
        style.finish(axes, title, name, "bits per byte")
        style.log_places(axes, places)
    figure.suptitle(style.about(rows), fontsize=8)
    style.legend(figure, list(all_axes), width)
    return figure


def _draw_model(axes: Axes, points: Points, label: str, number: int) -> None:
    """Draws a line through the means, bars from the least to the greatest."""
    lengths = sorted(points)
    mean = [sum(points[n].values()) / len(points[n]) for n in lengths]
    low = [m - min(points[n].values()) for m, n in zip(mean, lengths, strict=True)]
    high = [max(points[n].values()) - m for m, n in zip(mean, lengths, strict=True)]
    look = style.look(number)
    axes.plot(lengths, mean, label=label, markersize=4, **look)
    if any(len(values) > 1 for values in points.values()):
        axes.errorbar(lengths, mean, yerr=[low, high], fmt="none", color=look["color"])


def _put(points: Points, label: str, place: int, seed: Any, value: float) -> None:
    if seed in points.setdefault(place, {}):
        raise ValueError(
            f"a curve has one point at an x for a seed: {label!r} has several at {place} tokens; "
            "tell its cases apart, or remove the rows that should not be there"
        )
    points[place][seed] = value


def _by_context(rows: Rows, label: str) -> Points:
    points: Points = {}
    for row in rows:
        _put(points, label, row["context_len"], row.get("seed"), row["bits_per_byte"])
    return points


def _by_position(rows: Rows, label: str) -> Points:
    """Returns the bits of each interval of the longest context, by the interval's end."""
    rows = [row for row in rows if "position_edges" in row]
    longest = max((row["context_len"] for row in rows), default=0)
    points: Points = {}
    for row in rows:
        if row["context_len"] == longest:
            ends, bits = row["position_edges"][1:], row["bits_per_byte_by_position"]
            for end, value in zip(ends, bits, strict=True):
                if value is not None:
                    _put(points, label, end, row.get("seed"), value)
    return points


def _has_twins(rows: Rows, label_of: Label) -> bool:
    """Whether runs of one seed share a label, and all rows name their run."""
    if not all(row.get("run") for row in rows):
        return False
    runs: dict[tuple, set[str]] = {}
    for row in rows:
        runs.setdefault((row["data"], label_of(row), row["seed"]), set()).add(row["run"])
    return any(len(names) > 1 for names in runs.values())


def _context_label(row: Mapping[str, Any], telling: Sequence[str]) -> str:
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
    if "train_carries_cache" in telling and not row.get("train_carries_cache", True):
        told.append("trained in cold windows")
    if row.get("train_cold_start_every"):
        told.append(f"trained in sequences of {row['train_cold_start_every']} windows")
    told += [f"{row[field]} {SIZES[field]}" for field in SIZES if field in telling]
    return f"{name} ({', '.join(told)})" if told else name
