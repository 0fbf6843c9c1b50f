"""Draws the curves of one or several runs into a PNG.

    python -m scripts.plot RUN [RUN ...] --out=curves.png [--x=step|tokens|seconds] [--y=KEY]

RUN is a work directory, or a folder whose sub-folders are work directories.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from longctx_jax import run_files
from longctx_jax.figures import curves, saving
from longctx_jax.training import metrics
from scripts import common

_OUT = flags.DEFINE_string("out", "curves.png", "File to write; its ending sets the format.")
_X = flags.DEFINE_enum("x", "step", ["step", "tokens", "seconds"], "Horizontal axis.")
_Y = flags.DEFINE_string("y", "bits_per_byte", "Metric of the upper panel, e.g. loss.")
_PANEL = flags.DEFINE_string(
    "panel", "tokens_per_s", "Metric of the lower panel, e.g. learning_rate."
)


def load_runs(folders: Sequence[pathlib.Path]) -> dict[str, list[dict[str, Any]]]:
    """The records of each run, by the shortest ending of its path that tells the runs apart.

    Raises:
        ValueError: if a run has no records yet.
    """
    paths = [folder.resolve() for folder in folders]
    n_parts = 1
    while len({path.parts[-n_parts:] for path in paths}) < len(paths):
        n_parts += 1
    runs = {}
    for path in paths:
        records = metrics.read_records(path / run_files.METRICS)
        if not records:
            raise ValueError(
                f"a run must have metric records: {path / run_files.METRICS} is empty; "
                "wait for its first config.log.every steps"
            )
        runs[os.path.join(*path.parts[-n_parts:])] = records
    return runs


def main(arguments: list[str]) -> None:
    """Reads, draws, writes."""
    if not arguments:
        raise common.UsageError("scripts.plot needs a run: got none; name its work directory")
    runs = load_runs(run_files.find_runs(arguments))
    figure = curves.draw_training_curves(runs, x=_X.value, y=_Y.value, panel=_PANEL.value)
    saving.save(figure, _OUT.value)
    print(f"wrote {_OUT.value}: {len(runs)} run(s)")


if __name__ == "__main__":
    common.run(main, accept_args=True)
