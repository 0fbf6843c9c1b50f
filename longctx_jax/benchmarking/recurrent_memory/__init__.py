"""The suite `memory`: recurrent memory over one long input, in every order, and attention."""

from collections.abc import Iterator

from longctx_jax.benchmarking import ratios
from longctx_jax.benchmarking.decode import SHAPES
from longctx_jax.benchmarking.rows import Flat, Row
from longctx_jax.benchmarking.suite import Request, Suite


def _rows(request: Request) -> Iterator[Row]:
    from longctx_jax.benchmarking.recurrent_memory import parts

    shapes = {name: request.shapes[name] for name in request.options["shapes"]}
    return parts.memory_rows(request.config, request.limits, request.parts, shapes=shapes)


def _panels(rows):
    from longctx_jax.benchmarking.recurrent_memory.panels import panels

    return panels(rows)


def _summary(row: Flat) -> str:
    if ratios.SPEED not in row:
        return ""
    return (
        f"{row['name']}, {row.get('pass', 'prefill')}, {row['seq_len']} tokens, segments of "
        f"{row['segment_len']}: {ratios.text(row)} times as fast"
    )


SUITE = Suite(
    parts=("lengths", "groups", "long", "drift", "train"),
    rows=_rows,
    panels=_panels,
    summary=_summary,
    options=(SHAPES,),
    columns=("cell_ms", "cells", "launches", "relative_error"),
)
