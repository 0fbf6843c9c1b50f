"""The suite `vq`: vector-quantised attention by length, codebook, block and reduction; models."""

import functools
import pathlib
from collections.abc import Iterator

from longctx_jax.benchmarking import ratios
from longctx_jax.benchmarking.rows import Flat, Row
from longctx_jax.benchmarking.suite import Option, Request, Suite, rows_by_part

HEADS = ("shga", "mqa", "mha")  # single-head gated, multi-query, multi-head
VARIANTS = ("codes", "blocks", "reductions")


def _rows(request: Request) -> Iterator[Row]:
    import jax

    from longctx_jax.benchmarking.vq import layers, models, peers

    # First of all: a folder that is no checkout costs no measurement.
    checkouts = [peers.load(pathlib.Path(folder)) for folder in request.options["peers"]]
    limits, heads = request.limits, request.options["heads"]
    sizes = layers.setting(jax.default_backend(), limits)
    measure = {
        "layer": functools.partial(layers.layer_part, sizes, limits, heads, checkouts),
        "slope": functools.partial(layers.slope_part, sizes, limits, heads),
        "search": functools.partial(layers.search_part, sizes, limits),
        "model": functools.partial(models.model_rows, request.config, limits, heads),
        "decode": functools.partial(models.decode_rows, limits, heads),
    }
    for part in VARIANTS:
        measure[part] = functools.partial(layers.variants_part, sizes, limits, part)
    return rows_by_part(request, measure)


def _panels(rows):
    from longctx_jax.benchmarking.vq.panels import panels

    return panels(rows)


def _summary(row: Flat) -> str:
    """A ratio or a slope."""
    about = f"{row['name']}, {row.get('head_type')}, {row.get('pass')}"
    if "exponent" in row:
        return (
            f"{about}: time grows as length^ {ratios.text(row, 'exponent')} from "
            f"{row['lengths'][0]} to {row['lengths'][-1]} tokens"
        )
    if ratios.SPEED not in row:
        return ""
    return f"{about}, {row['seq_len']} tokens: {ratios.text(row)} times as fast"


SUITE = Suite(
    parts=("layer", "slope", *VARIANTS, "search", "model", "decode"),
    rows=_rows,
    panels=_panels,
    summary=_summary,
    options=(
        Option("heads", "Head types (shga, mqa, mha); empty = all.", words=HEADS, default=HEADS),
        Option("peers", "Folders of checkouts of the published implementation, of either branch."),
    ),
    columns=("relative_time", "roofline_fraction", "rel_rms_to_linear", "token_ms", "cache_bytes"),
)
