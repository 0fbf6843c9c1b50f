"""The picture of a diagonal schedule: which cells run in which step, drawn from its phases."""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from longctx_jax.figures import style
from longctx_jax.models.schedules.diagonal import ramp_phases

USEFUL, IDLE, OFF = 2, 1, 0


def step_grid(n_segments: int, n_repeats: int, pattern_len: int, n_buckets: int) -> np.ndarray:
    """Returns [layers, steps]: USEFUL where a cell does work, IDLE where it runs without any."""
    n_layers = n_repeats * pattern_len
    grid = np.full((n_layers, n_segments + n_layers - 1), OFF)
    for phase in ramp_phases(n_segments, n_repeats, pattern_len, n_buckets):
        lanes = np.arange(phase.low * pattern_len, phase.high * pattern_len)
        for step in range(phase.start, phase.stop):
            segment = step - lanes
            is_useful = (segment >= 0) & (segment < n_segments)
            grid[lanes, step] = np.where(is_useful, USEFUL, IDLE)
    return grid


def draw_schedule(
    n_segments: int, n_repeats: int, pattern_len: int = 1, n_buckets: int = 4
) -> Figure:
    """Steps from left to right, layers upwards, in each cell the number of its segment.

    All cells of a column run at once. Phases, each compiled for its own layers, are framed.
    """
    grid = step_grid(n_segments, n_repeats, pattern_len, n_buckets)
    n_layers, n_steps = grid.shape
    width = min(14.0, 1.5 + 0.36 * n_steps)
    figure = style.new_figure(width, 1.4 + 0.36 * n_layers)
    axes = figure.subplots()
    colors = ListedColormap(["white", "#f2d9b8", "#9ec5e8"])
    axes.pcolormesh(grid, cmap=colors, vmin=0, vmax=2, edgecolors="white", linewidth=1.5)
    for layer, step in zip(*np.nonzero(grid == USEFUL), strict=True):
        place = (step + 0.5, layer + 0.5)
        axes.text(*place, str(step - layer), ha="center", va="center", fontsize=8)
    for phase in ramp_phases(n_segments, n_repeats, pattern_len, n_buckets):
        low, high = phase.low * pattern_len, phase.high * pattern_len
        corners = (phase.start, low), phase.stop - phase.start, high - low
        axes.add_patch(_frame(*corners))
    axes.set_xlabel("step (all cells of a column run at once); numbers are segments")
    axes.set_ylabel("layer")
    axes.set_yticks(np.arange(n_layers) + 0.5, list(map(str, range(n_layers))))
    axes.set_xticks(np.arange(n_steps) + 0.5, list(map(str, range(n_steps))), fontsize=7)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    useful, idle = np.sum(grid == USEFUL), np.sum(grid == IDLE)
    axes.set_title(
        f"{n_segments} segments, {n_layers} layers: {n_steps} steps instead of "
        f"{n_segments * n_layers}; {useful} cells and {idle} idle ones (shaded)",
        fontsize=10,
    )
    return figure


def _frame(corner: tuple[int, int], width: int, height: int) -> Rectangle:
    return Rectangle(corner, width, height, fill=False, edgecolor="#2b5c8a", linewidth=1.2)
