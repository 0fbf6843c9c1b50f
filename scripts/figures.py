"""Draws every committed picture from its rows: python -m scripts.figures [--check] [FILE ...].

FILE is a file of rows in results/; none = all that have a picture, and docs/schedule.png. --check
draws nothing, and fails where a picture was drawn from other rows than lie beside it.
"""

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from scripts import common

_CHECK = flags.DEFINE_bool("check", False, "Only say which pictures are not those of their rows.")
RESULTS = pathlib.Path("results")
SCHEDULE = pathlib.Path("docs/schedule.png")
SCHEDULE_SIZES = (12, 6, 1, 3)  # segments, layers, length of a pattern, buckets


def drawers() -> dict[str, Callable[[pathlib.Path, pathlib.Path], None]]:
    """Returns what draws a file of rows into a picture, by the suite that the rows are of."""
    from longctx_jax.benchmarking import rows, run
    from longctx_jax.benchmarking.registry import SUITES
    from longctx_jax.figures.accounting import draw_accounting
    from longctx_jax.figures.contexts import draw_context_curves
    from longctx_jax.figures.recall import draw_recall
    from longctx_jax.figures.saving import save

    def with_function(draw: Callable[[Sequence[Any]], Any], path, picture) -> None:
        save(draw(rows.recorded(path)), picture, path)

    others = {"context": draw_context_curves, "recall": draw_recall}
    others["accounting"] = draw_accounting
    found = {name: functools.partial(run.draw, suite) for name, suite in SUITES.items()}
    return found | {n: functools.partial(with_function, f) for n, f in others.items()}


def suite_of(path: pathlib.Path) -> str:
    """Returns the suite that the rows of a file are of."""
    from longctx_jax.benchmarking import rows

    return str(rows.read(path)[0]["case"].get("suite"))


def is_stale(path: pathlib.Path) -> bool:
    """Whether the picture beside a file of rows is missing, or of other rows."""
    from longctx_jax.figures.saving import digest, drawn_from

    picture = path.with_suffix(".png")
    return not picture.is_file() or drawn_from(picture) != digest(path)


def main(arguments: list[str]) -> None:
    """Draws, or checks."""
    draw = drawers()
    suites = {p: suite_of(p) for p in map(pathlib.Path, arguments)}
    if not arguments:
        every = {path: suite_of(path) for path in sorted(RESULTS.glob("*.jsonl"))}
        suites = {path: suite for path, suite in every.items() if suite in draw}
    for path, suite in suites.items():
        if suite not in draw:
            raise ValueError(
                f"{path}: rows with a picture are of {', '.join(draw)}: got {suite}; name another "
                "file"
            )
    if _CHECK.value:
        stale = [str(path.with_suffix(".png")) for path in suites if is_stale(path)]
        if stale:
            raise ValueError(
                f"a picture must be of the rows beside it: {', '.join(stale)} are not; run python "
                "-m scripts.figures"
            )
        print(f"{len(suites)} pictures are of their rows")
        return
    for path, suite in suites.items():
        picture = path.with_suffix(".png")
        draw[suite](path, picture)
        print(f"wrote {picture}", flush=True)
    if not arguments:
        from longctx_jax.figures.saving import save
        from longctx_jax.figures.schedule import draw_schedule

        save(draw_schedule(*SCHEDULE_SIZES), SCHEDULE)
        print(f"wrote {SCHEDULE}")


if __name__ == "__main__":
    common.run(main, accept_args=True)
