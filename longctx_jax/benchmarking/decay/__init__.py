"""The suite `decay`: every form of decay attention, exact attention, and other libraries' code."""

from collections.abc import Iterator, Sequence

from longctx_jax.benchmarking.decay.parts import PARTS
from longctx_jax.benchmarking.rows import Fields, Flat, Row
from longctx_jax.benchmarking.suite import Option, Request, Suite


def _rows(request: Request) -> Iterator[Row]:
    from longctx_jax.benchmarking.decay import forms

    has_peers = bool(request.options["peers"])
    return forms.decay_rows(request.limits, request.parts, with_peers=has_peers)


def _panels(rows):
    from longctx_jax.benchmarking.decay.panels import panels

    return panels(rows)


def _summary(row: Flat) -> str:
    from longctx_jax.benchmarking.decay.summary import summary_text

    return summary_text(row)


def _record(request: Request, rows: Sequence[Flat], environment: Fields) -> list[str]:
    """Writes the table that "auto" decides by, from rows of this device and jax, and checks it."""
    if not request.options["record"]:
        return []
    from longctx_jax.benchmarking.decay import summary

    same = ("device", "jax_version")
    rows = [row for row in rows if all(row.get(name) == environment[name] for name in same)]
    rows = [row for row in rows if not row.get("is_quick")]
    path, wrong = summary.record(rows, environment)
    lines = [f"wrote {len(summary.table_rows(rows))} shapes to {path}"]
    lines += [f"auto is not within 10 % of the best: {line}" for line in wrong]
    if not wrong:
        lines.append("auto is within 10 % of the best form at every recorded shape and pass")
    return lines


SUITE = Suite(
    parts=PARTS,
    rows=_rows,
    panels=_panels,
    summary=_summary,
    options=(
        Option(
            "peers",
            "all = other libraries that are installed, timed beside ours.",
            words=("all",),
        ),
        Option(
            "record",
            'Write the table that "auto" decides by, from all rows in --out.',
            is_switch=True,
            is_real=True,
        ),
    ),
    columns=("roofline_fraction", "tb_per_s", "max_error"),
    after=_record,
)
