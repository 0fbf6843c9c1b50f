"""Following a run from another process by the checkpoints that it leaves."""

import json
import os
import pathlib
import time
from collections.abc import Iterator

from longctx_jax import run_files


def steps_as_they_come(
    workdir: str | os.PathLike[str], results: pathlib.Path, poll_s: float, split: str
) -> Iterator[int]:
    """Yields the newest step that has no result yet, as often as there is one.

    Ends when the run has finished and its last checkpoint has been given. A checkpoint that is
    deleted before anybody looked is passed over: the newest counts.

    Args:
        workdir: of the run.
        results: JSON lines with "step" and "split" of what was done before.
        poll_s: seconds between looks.
        split: that the results are for.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    folder = pathlib.Path(workdir)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--workdir must be the folder of a run: {folder} does not exist; start scripts.train "
            "first"
        )
    last = max(_steps_done(results, split), default=-1)
    while True:
        is_finished = (folder / run_files.DONE).exists()  # asked first: what is there then is all
        newest = max(_saved_steps(folder), default=-1)
        if newest > last:
            last = newest
            yield newest
        elif is_finished:
            return
        else:
            time.sleep(poll_s)


def _saved_steps(folder: pathlib.Path) -> list[int]:
    """Steps with a finished checkpoint: Orbax names a folder by its number when it is whole."""
    parent = folder / run_files.CHECKPOINTS
    if not parent.is_dir():
        return []
    return [int(path.name) for path in parent.iterdir() if path.name.isdigit()]


def _steps_done(results: pathlib.Path, split: str) -> list[int]:
    found = []
    lines = results.read_text(errors="replace").splitlines() if results.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and row.get("split") == split and "step" in row:
            found.append(int(row["step"]))
    return found
