"""Which folders are runs: patterns from the command line to work directories.

A run is a folder with one of `RUN_FILES`. A pattern names runs, or folders up to `MAX_DEPTH` levels
above them, such as that of a sweep or of several sweeps.
"""

import glob
import os
import pathlib
from collections.abc import Iterator, Sequence

from longctx_jax import run_files

RUN_FILES = (run_files.METRICS, run_files.CONFIG, run_files.DONE)
MAX_DEPTH = 2


def find_runs(patterns: str) -> list[pathlib.Path]:
    """The work directories that comma-separated patterns match, each once, in order.

    Names of runs may hold commas themselves: a pattern is the longest text, from comma to comma,
    that matches something.

    Args:
        patterns: paths or globs, e.g. `runs/lr,runs/decay*`.

    Raises:
        FileNotFoundError: if a pattern matches nothing, or only what has no runs.
    """
    found: dict[pathlib.Path, None] = {}
    for pattern in _split(patterns):
        below = [run for path in _matches(pattern) for run in _runs_below(path, MAX_DEPTH)]
        if not below:
            raise FileNotFoundError(
                f"--runs must match folders with {' or '.join(RUN_FILES)}: got {pattern!r}, "
                f"{'which holds none' if _matches(pattern) else 'which matches nothing'}; give "
                "the --workdir of scripts.train or scripts.sweep, or quote a glob of such folders"
            )
        found.update(dict.fromkeys(below))
    return list(found)


def short_names(folders: Sequence[pathlib.Path]) -> list[str]:
    """The shortest endings of the paths that tell all of them apart."""
    paths = [folder.resolve() for folder in folders]
    n_parts = 1
    while len({path.parts[-n_parts:] for path in paths}) < len(set(paths)):
        n_parts += 1
    return [os.path.join(*path.parts[-n_parts:]) for path in paths]


def _split(patterns: str) -> Iterator[str]:
    """The patterns; a comma stays where the longer text matches something."""
    parts = patterns.split(",")
    while parts:
        lengths = range(len(parts), 0, -1)
        length = next((n for n in lengths if _matches(",".join(parts[:n]))), 1)
        yield ",".join(parts[:length])
        parts = parts[length:]


def _matches(pattern: str) -> list[pathlib.Path]:
    path = os.path.expanduser(pattern)
    if os.path.exists(path):  # a name is itself, brackets included
        return [pathlib.Path(path)]
    return sorted(map(pathlib.Path, glob.glob(path)))


def _runs_below(folder: pathlib.Path, depth: int) -> Iterator[pathlib.Path]:
    """The folder if it is a run, otherwise the runs at most `depth` levels below it."""
    if not folder.is_dir():
        return
    if any((folder / name).is_file() for name in RUN_FILES):
        yield folder
    elif depth:
        for child in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
            yield from _runs_below(child, depth - 1)
