"""What models hold in memory, by context: rows of scripts.accounting, flat."""

from matplotlib.figure import Figure

from longctx_jax.figures import style
from longctx_jax.figures.style import Rows
from longctx_jax.units import bytes_text


def draw_accounting(rows: Rows) -> Figure:
    """Returns the caches by context, and the peak of the loop over tokens beside it.

    Of the batch, weights and dtype with the most rows. Crosses are compiled programs; a dotted
    line is the budget, if there is one.

    Raises:
        ValueError: if no row is about a cache.
    """
    loops = [r for r in rows if r["part"] == "programs" and r["program"] == "loop"]
    if not loops:
        raise ValueError("a figure of memory needs rows of programs: got none; give --contexts")
    settings = [_setting(row) for row in loops]
    setting = max(settings, key=settings.count)
    loops = [row for row in loops if _setting(row) == setting]
    names = list(dict.fromkeys(row["name"] for row in loops))
    height = 5.0 + style.legend_height(len(names) + 1, max(map(len, names)), 12)
    figure = style.new_figure(12, height)
    left, right = figure.subplots(1, 2)
    for number, name in enumerate(names):
        own = [row for row in loops if row["name"] == name]
        look = {"markersize": 4, **style.look(number)}
        caches = style.curve(((r["context_len"], r["cache_bytes"]) for r in own), name, "context")
        peaks = ((r["context_len"], r["predicted"]["peak"]) for r in own)
        left.plot(*caches, label=name, **look)
        right.plot(*style.curve(peaks, name, "context"), **look)
        measured = [(r["context_len"], r["compiled"]["peak"]) for r in own if "compiled" in r]
        if measured:
            right.plot(*zip(*measured, strict=True), "x", color="k", markersize=4)
    for budget in {row["budget_bytes"] for row in rows if row["part"] == "contexts"}:
        label = f"budget: {bytes_text(budget)}"
        right.axhline(budget, color="0.5", linestyle=":", linewidth=1, label=label)
    peak = "peak of the loop over tokens"
    if any("compiled" in row for row in loops):
        peak += " (x: as compiled)"
    for axes, title in ((left, "cache, by scheme"), (right, peak)):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(lambda value, _: bytes_text(value))
        style.finish(axes, title, "context (tokens)")
        style.log_places(axes, [row["context_len"] for row in loops])
    about = "batch {}, weights {}, products {}".format(*setting)
    figure.suptitle(f"{about}; {style.about(rows)}", fontsize=8)
    style.legend(figure, [left, right], 12)
    return figure


def _setting(row: style.Flat) -> tuple:
    return row["batch_size"], row["weight_dtype"], row["dtype"]
