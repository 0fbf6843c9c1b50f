"""Figures and tables from benchmark rows; pure functions, no files and no timing.

Rows of several recordings may share a file: of rows about the same thing the newest counts.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from longctx_jax.benchmarking import decay_figures, memory_figures, vq_figures

Rows = Sequence[Mapping[str, Any]]
IDENTITY = (
    "suite",
    "part",
    "pass",
    "name",
    "device",
    "batch_size",
    "seq_len",
    "context_len",
    "n_layers",
    "d_model",
    "n_heads",
    "d_key",
    "d_value",
    "dtype",
    "is_per_token",
    "remat",
    "head_type",
    "n_codes",
    "window_len",
    "block_len",
    "reduction",
    "shape",
    "segment_len",
    "n_cells",
)
COLUMNS = (
    "name",
    "shape",
    "segment_len",
    "n_cells",
    "head_type",
    "pass",
    "batch_size",
    "seq_len",
    "median_ms",
    "tokens_per_s",
)
MIDDLE_COLUMNS = (
    *("token_ms", "cell_ms", "cells", "launches", "cache_bytes", "model_flops_per_s"),
    *("d_key", "n_codes", "block_len", "reduction", "relative_time"),
    *("roofline_fraction", "tb_per_s", "max_error", "rel_rms_to_linear", "relative_error"),
)
MAX_COLUMNS = 5  # of panels
N_COLORS = 10  # of the cycle; further lines have another marker
LAST_COLUMNS = ("compile_s", "peak_bytes", "n_runs", "speed_ratio", "skipped")


def newest(rows: Rows) -> list[Mapping[str, Any]]:
    """Returns the last row of each `IDENTITY`, in order of first appearance."""
    found: dict[tuple, Mapping[str, Any]] = {}
    for row in rows:
        found[tuple(str(row.get(name)) for name in IDENTITY)] = row
    return list(found.values())


def format_table(rows: Rows) -> str:
    """Returns the rows as text in columns; a column that no row fills is left out."""
    names = [n for n in COLUMNS + MIDDLE_COLUMNS + LAST_COLUMNS if any(n in r for r in rows)]
    lines = [names] + [[_cell(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in ("name", "skipped") else cell.rjust(width)
            for name, cell, width in zip(names, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def case_name(row: Mapping[str, Any]) -> str:
    """Returns the name of a row, with its shape in the suite decay, which has many."""
    if row["suite"] != "decay":
        return row["name"]
    shape = "batch {batch_size}, {n_heads} heads of {d_key}, {seq_len} tokens, {dtype}"
    return f"{row['name']}, {row['pass']}, {shape.format(**row)}"


def progress(row: Mapping[str, Any]) -> str:
    """Returns one line about a row just measured."""
    where = " ".join(f"{n}={row[n]}" for n in ("pass", "batch_size", "seq_len") if n in row)
    if "median_ms" not in row:
        names = ("speed_ratio", "exponent", "relative_error", "skipped")
        told = (row[n] for n in names if n in row)
        return f"{row['name']}: {next(told, '')}"
    return f"{row['name']} {where}: {row['median_ms']:.4g} ms, {row['tokens_per_s']:,.0f} tokens/s"


def draw_rows(rows: Rows) -> Figure:
    """Returns the figure of one suite's rows.

    train: speed of each model, speed by length, time by schedule. decode: time a token, prefill
    and cache by context length, time a token of staggered stacks. decay, vq: see
    `decay_figures.py`, `vq_figures.py`. Bars and points are medians, whiskers quartiles.

    Raises:
        ValueError: if there is no row, or rows of several suites or devices.
    """
    rows = newest(rows)
    for field in ("suite", "device"):
        values = sorted({str(row.get(field)) for row in rows})
        if len(values) != 1:
            raise ValueError(
                f"a benchmark figure needs rows of one {field}: got {values or 'none'}; give each "
                "its own --out file"
            )
    timed = [row for row in rows if "median_ms" in row]
    panels: list[tuple[str, Callable[[Axes], None]]] = []
    if rows[0]["suite"] == "decode":
        panels = _decode_panels(timed)
    elif rows[0]["suite"] == "decay":
        panels = decay_figures.panels(timed)
    elif rows[0]["suite"] == "vq":
        panels = vq_figures.panels(rows)
    elif rows[0]["suite"] == "memory":
        panels = memory_figures.panels(rows)
    else:
        parts = {
            p: [r for r in timed if r["part"] == p]
            for p in ("models", "lengths", "schedules", "saves")
        }
        panels = _train_panels(parts)
    if not panels:
        raise ValueError("a benchmark figure needs timed rows: got none; run the suite first")
    n_columns = min(len(panels), MAX_COLUMNS)
    n_rows = -(-len(panels) // n_columns)
    figure = Figure(figsize=(5.2 * n_columns, 4.6 * n_rows), layout="constrained", dpi=120)
    for place, (title, draw) in enumerate(panels, start=1):
        axes = figure.add_subplot(n_rows, n_columns, place)
        draw(axes)
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    shape = rows[0]
    figure.suptitle(
        f"{shape['device']}, jax {shape.get('jax_version')}, {str(shape.get('date'))[:10]}, "
        f"revision {shape.get('revision')}",
        fontsize=9,
    )
    return figure


def _train_panels(parts: Mapping[str, Rows]) -> list[tuple[str, Callable[[Axes], None]]]:
    panels: list[tuple[str, Callable[[Axes], None]]] = []
    if rows := parts["models"]:
        title = "one update, batch {batch_size} x {seq_len} tokens".format(**rows[0])
        panels.append((title, lambda axes, rows=rows: _bars(axes, rows)))
    if rows := parts["lengths"]:
        title = "training speed by sequence length"
        panels.append(
            (title, lambda axes, rows=rows: _lines(axes, rows, "seq_len", "tokens_per_s"))
        )
    if rows := [row for row in parts["schedules"] if row["pass"] == "train"]:
        title = "{n_layers} layers, one row of {seq_len} tokens".format(**rows[0])
        panels.append((title, lambda axes, rows=rows: _bars(axes, rows)))
    if rows := parts["saves"]:
        panels.append(("what checkpoints cost", lambda axes, rows=rows: _saves(axes, rows)))
    return panels


def _saves(axes: Axes, rows: Rows) -> None:
    names = ["{name}, every {checkpoint_every} steps".format(**row) for row in rows]
    axes.barh(names, [100 * row["overhead_fraction"] for row in rows])
    axes.set_xlabel("time of the run that saves take, %")


def _decode_panels(rows: Rows) -> list[tuple[str, Callable[[Axes], None]]]:
    stacks = [row for row in rows if row.get("part") == "stacks"]
    initial = [row for row in rows if row.get("part") == "initial"]
    attention = [row for row in rows if row.get("part") == "attention" and "median_ms" in row]
    mixers = [row for row in rows if row.get("part") not in ("stacks", "initial", "attention")]
    panels = _context_panels(mixers, "")
    for name in dict.fromkeys(row["implementation"] for row in attention):
        own = [row for row in attention if row["implementation"] == name]
        draw = functools.partial(_lines, rows=own, x="context_len", y="median_ms")
        panels.append((f"one query, {name}: time a layer", draw))
    for shape in dict.fromkeys(row["shape"] for row in initial):
        own = [row for row in initial if row["shape"] == shape]
        panels += _context_panels(own, f"attention to embeddings, {shape}: ")
    fields = ("shape", "batch_size", "context_len")
    for case in sorted({tuple(row[name] for name in fields) for row in stacks}):
        own = [r for r in stacks if tuple(r[name] for name in fields) == case]
        title = "stacks, {}, batch {}, {} tokens before, {} new".format(
            *case, own[0]["n_new_tokens"]
        )
        panels.append((title, functools.partial(_bars, rows=own)))
    return panels


def _context_panels(rows: Rows, prefix: str) -> list[tuple[str, Callable[[Axes], None]]]:
    """Time a token, of prefill, and memory, by context."""
    loop = [row for row in rows if row["pass"] == "loop"]
    prefill = [row for row in rows if row["pass"] == "prefill"]
    if not loop:
        return []
    drawn = (
        ("time a token", loop, "token_ms"),
        ("time of prefill", prefill, "median_ms"),
        ("memory of the cache", loop, "cache_bytes"),
    )
    return [
        (prefix + title, functools.partial(_lines, rows=own, x="context_len", y=y))
        for title, own, y in drawn
        if own
    ]


def _bars(axes: Axes, rows: Rows) -> None:
    middle = [row["median_ms"] for row in rows]
    errors = [
        [row["median_ms"] - row["quartile_1_ms"] for row in rows],
        [row["quartile_3_ms"] - row["median_ms"] for row in rows],
    ]
    labels = [
        f"{row['name']}\n({row['cells']} cells)" if "cells" in row else row["name"] for row in rows
    ]
    bars = axes.barh(labels, middle, xerr=errors, color="tab:blue", height=0.6, ecolor="0.3")
    axes.bar_label(bars, fmt="%.4g", padding=6, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("time (ms): median and quartiles")


def _lines(axes: Axes, rows: Rows, x: str, y: str) -> None:
    units = {
        "token_ms": "ms a token",
        "median_ms": "ms",
        "cache_bytes": "bytes",
        "tokens_per_s": "tokens/s",
    }
    batches = sorted({row["batch_size"] for row in rows}) if x == "context_len" else [None]
    kinds = list(dict.fromkeys(row["pattern"][0] for row in rows))
    for color, kind in enumerate(kinds):
        for style, batch in zip(("-", "--", ":", "-."), batches, strict=False):
            chosen = [
                r for r in rows if r["pattern"][0] == kind and batch in (None, r["batch_size"])
            ]
            chosen.sort(key=lambda r: r[x])
            label = kind if batch is None else f"{kind}, batch {batch}"
            points = [r[x] for r in chosen], [r[y] for r in chosen]
            marker = "o" if color < N_COLORS else "s"
            axes.plot(*points, marker=marker, color=f"C{color}", linestyle=style, label=label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(EngFormatter(sep="", places=0))
    axes.set_yscale("log")
    axes.set_xlabel("tokens a row" if x == "seq_len" else "context (tokens)")
    axes.set_ylabel(units[y])
    axes.legend(fontsize=8 if len(axes.lines) <= N_COLORS else 5)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        if 0 < abs(value) < 1e-3:
            return f"{value:.1e}"
        return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
