"""The suite `decode`: prefill and the compiled token loop, by context, batch and model."""

import functools
from collections.abc import Iterator

from longctx_jax.benchmarking import ratios
from longctx_jax.benchmarking.rows import Flat, Row
from longctx_jax.benchmarking.suite import Option, Request, Suite, rows_by_part


def _rows(request: Request) -> Iterator[Row]:
    from longctx_jax.benchmarking.decode import attention, initial, mixers, stacks
    from longctx_jax.nn.mixers import MIXERS

    limits = request.limits
    shapes = {name: request.shapes[name] for name in request.options["shapes"]}
    measure = {
        "mixers": functools.partial(
            mixers.mixer_rows, request.config, limits, request.mixers or MIXERS
        ),
        "stacks": functools.partial(stacks.stack_rows, limits, shapes),
        "initial": functools.partial(initial.initial_rows, limits, shapes),
        "attention": functools.partial(attention.attention_rows, limits),
    }
    return rows_by_part(request, measure)


def _panels(rows):
    from longctx_jax.benchmarking.decode.panels import panels

    return panels(rows)


def _summary(row: Flat) -> str:
    """A ratio; the saving is what the StagFormer paper states as 33 %."""
    if ratios.SPEED not in row:
        return ""
    saving = 1 - 1 / row[ratios.SPEED]
    return (
        f"{row['variant']} against {row['baseline']}, {row.get('pass', 'attention')}, batch "
        f"{row['batch_size']}, {row['context_len']:,} tokens before: {ratios.text(row)} times "
        f"tokens/s, {100 * saving:.0f} % less time a token"
    )


SHAPES = Option(
    "shapes",
    "LLaMA shapes on a GPU (160m, 1b, 3b, 8b); empty = 160m and 1b.",
    words=lambda request: tuple(request.shapes),
    default=("160m", "1b"),
)
SUITE = Suite(
    parts=("mixers", "stacks", "initial", "attention"),
    rows=_rows,
    panels=_panels,
    summary=_summary,
    options=(SHAPES,),
    columns=("token_ms", "cache_bytes", "roofline_fraction"),
)
