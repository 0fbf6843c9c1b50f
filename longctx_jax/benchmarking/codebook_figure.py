"""The figure of scripts.codebooks: how evenly each layer uses its codes."""

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure


def draw_code_use(use: Mapping[int, np.ndarray]) -> Figure:
    """Share of the keys by code, codes sorted by use; a line a layer, uniform use dotted.

    Args:
        use: layer -> shares [codes], descending, of one head or averaged over heads.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    n_codes = max(len(shares) for shares in use.values())
    for i, (layer, shares) in enumerate(use.items()):
        color = colormaps["viridis"](i / max(1, len(use) - 1))
        axes.plot(np.arange(1, len(shares) + 1), shares, color=color, label=f"layer {layer}")
    axes.axhline(1 / n_codes, color="0.6", linestyle=":", label="uniform")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-3 / n_codes)
    axes.set_xlabel("code, by use")
    axes.set_ylabel("share of the keys")
    axes.grid(alpha=0.3)
    if len(use) <= 12:
        axes.legend(fontsize=8)
    return figure
