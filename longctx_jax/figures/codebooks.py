"""The figure of scripts.codebooks: how evenly each layer uses its codes."""

from collections.abc import Mapping

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from longctx_jax.figures import style


def draw_code_use(use: Mapping[int, np.ndarray]) -> Figure:
    """Share of the keys by code, codes sorted by use; a line a layer, uniform use dotted.

    Args:
        use: layer -> shares [codes], descending, of one head or averaged over heads.
    """
    n_rows = len(use) + 1
    figure = style.new_figure(6.4, 4.2 + style.legend_height(n_rows, 8, 6.4))
    axes = figure.subplots()
    n_codes = max(len(shares) for shares in use.values())
    for i, (layer, shares) in enumerate(use.items()):
        color = colormaps["viridis"](i / max(1, len(use) - 1))
        axes.plot(np.arange(1, len(shares) + 1), shares, color=color, label=f"layer {layer}")
    axes.axhline(1 / n_codes, color="0.6", linestyle=":", label="uniform")
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-3 / n_codes)
    style.finish(axes, "how evenly each layer uses its codes", "code, by use", "share of the keys")
    style.legend(figure, [axes], 6.4)
    return figure
