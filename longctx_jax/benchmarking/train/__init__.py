"""The suite `train`: whole updates of models, and what checkpoints cost."""

import functools
from collections.abc import Iterator

from longctx_jax.benchmarking import ratios
from longctx_jax.benchmarking.rows import Flat, Row
from longctx_jax.benchmarking.suite import Request, Suite, rows_by_part


def _rows(request: Request) -> Iterator[Row]:
    from longctx_jax.benchmarking.train import parts, saves
    from longctx_jax.nn.mixers import MIXERS

    measure = {
        "models": parts.models_part,
        "lengths": parts.lengths_part,
        "schedules": parts.schedules_part,
        "saves": saves.saves_part,
    }
    arguments = (request.config, request.limits, request.mixers or MIXERS)
    return rows_by_part(request, {k: functools.partial(v, *arguments) for k, v in measure.items()})


def _panels(rows):
    from longctx_jax.benchmarking.train.panels import panels

    return panels(rows)


def _summary(row: Flat) -> str:
    if "overhead_fraction" in row:
        return (
            f"saving every {row['checkpoint_every']} steps: {100 * row['overhead_fraction']:.2f} % "
            f"of the run ({row['save_wait_ms']:.0f} ms a save waited for, "
            f"{row['save_extra_ms']:.0f} ms in all)"
        )
    if ratios.SPEED not in row:
        return ""
    return f"{row['name']}: {ratios.text(row)} tokens/s for tokens/s"


SUITE = Suite(
    parts=("models", "lengths", "schedules", "saves"),
    rows=_rows,
    panels=_panels,
    summary=_summary,
    columns=("model_flops_per_s", "cells", "overhead_fraction"),
)
