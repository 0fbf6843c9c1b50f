"""Draws every committed picture from its rows: python -m scripts.figures [--check] [FILE ...].

FILE is a file of rows in results/; none = all, and docs/schedule.png. --check draws nothing, and
fails where a picture was drawn from other rows than lie beside it.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from scripts import common

_CHECK = flags.DEFINE_bool("check", False, "Only say which pictures are not those of their rows.")
RESULTS = pathlib.Path("results")
SCHEDULE = pathlib.Path("docs/schedule.png")
SCHEDULE_SIZES = (12, 6, 1, 3)  # segments, layers, length of a pattern, buckets
NOT_DRAWN = ("faults", "registers", "runs")  # tables say it


def draw(path: pathlib.Path) -> None:
    """Draws the rows of a file beside it.

    Raises:
        ValueError: if nobody draws rows of their suite.
    """
    from longctx_jax.benchmarking import rows, run
    from longctx_jax.benchmarking.registry import SUITES
    from longctx_jax.figures.accounting import draw_accounting
    from longctx_jax.figures.contexts import draw_context_curves
    from longctx_jax.figures.recall import draw_recall
    from longctx_jax.figures.saving import save

    name = suite_of(path)
    if name in SUITES:
        run.draw(SUITES[name], path, path.with_suffix(".png"))
        return
    draws: dict[str, Callable[[Sequence[Any]], Any]] = {
        "context": draw_context_curves,
        "recall": draw_recall,
        "memory_accounting": draw_accounting,
    }
    if name not in draws:
        known = ", ".join([*SUITES, *draws])
        raise ValueError(f"{path}: rows must be of {known}: got {name!r}; name another file")
    save(draws[name](rows.recorded(path)), path.with_suffix(".png"), path)


def suite_of(path: pathlib.Path) -> str:
    """Returns the suite that the rows of a file say they are of."""
    from longctx_jax.benchmarking import rows

    return str(rows.read(path)[0]["case"].get("suite"))


def drawn_files() -> list[pathlib.Path]:
    """Returns the committed files of rows that have a picture."""
    return [path for path in sorted(RESULTS.glob("*.jsonl")) if suite_of(path) not in NOT_DRAWN]


def is_stale(path: pathlib.Path) -> bool:
    """Whether the picture beside a file of rows is missing, or of other rows."""
    from longctx_jax.figures.saving import digest, drawn_from

    picture = path.with_suffix(".png")
    return not picture.is_file() or drawn_from(picture) != digest(path)


def main(arguments: list[str]) -> None:
    """Draws, or checks."""
    paths = [pathlib.Path(argument) for argument in arguments] or drawn_files()
    if _CHECK.value:
        stale = [str(path.with_suffix(".png")) for path in paths if is_stale(path)]
        if stale:
            raise ValueError(
                f"a picture must be of the rows beside it: {', '.join(stale)} are not; run python "
                "-m scripts.figures"
            )
        print(f"{len(paths)} pictures are of their rows")
        return
    for path in paths:
        draw(path)
        print(f"wrote {path.with_suffix('.png')}", flush=True)
    if not arguments:
        from longctx_jax.figures.saving import save
        from longctx_jax.figures.schedule import draw_schedule

        save(draw_schedule(*SCHEDULE_SIZES), SCHEDULE)
        print(f"wrote {SCHEDULE}")


if __name__ == "__main__":
    common.run(main, accept_args=True)
