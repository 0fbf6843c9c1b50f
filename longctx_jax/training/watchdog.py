"""Noticing that a long run hangs, stalls or stumbles.

`Watchdog` writes the stacks of all threads when no step has ended for too long: a thread of the
interpreter's C code does it, so it works while Python is stuck in a collective or a read.
`StepTimes` tells time spent waiting for data from time spent in steps, and names outliers.
"""

import dataclasses
import faulthandler
import pathlib
import statistics
import time
from typing import IO

from absl import logging

from longctx_jax import run_files

OUTLIER = 3.0  # a step this many times slower than the median is one
LEAST_OUTLIER_S = 0.5  # steps faster than that never are
N_RECENT = 101  # steps the median is of


class Watchdog:
    """Dumps stacks into `workdir/hang.txt` if `pat` is not called for timeout_s; 0 = never.

    Args:
        process_index: of several processes, others than the first write hang.INDEX.txt.
        must_exit: end the process (exit code 1) after the dump, for a scheduler to start it again.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        timeout_s: float,
        *,
        process_index: int = 0,
        must_exit: bool = False,
    ):
        self._timeout_s, self._must_exit = timeout_s, must_exit
        name = (
            run_files.HANG.replace(".", f".{process_index}.") if process_index else run_files.HANG
        )
        self._path = workdir / name
        self._file: IO[str] | None = self._path.open("a") if timeout_s > 0 else None

    def pat(self) -> None:
        """Says that the run is alive."""
        if self._file is not None:
            faulthandler.dump_traceback_later(
                self._timeout_s, file=self._file, exit=self._must_exit
            )

    def close(self) -> None:
        """Stops watching; an empty file goes."""
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            self._file = None
            if not self._path.stat().st_size:
                self._path.unlink()


@dataclasses.dataclass
class StepTimes:
    """Where the time since the last record went: waiting for data, and steps as a whole."""

    waits: list[float] = dataclasses.field(default_factory=list)
    steps: list[float] = dataclasses.field(default_factory=list)
    recent: list[float] = dataclasses.field(default_factory=list)
    _last: float = 0.0

    def skip(self) -> None:
        """Leaves out the time since the last step: it went into saving or evaluating."""
        self._last = time.monotonic()

    def add(self, step: int, wait_s: float) -> None:
        """Counts a step that has just ended; logs it if it stands out."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self.waits.append(wait_s)
        self.steps.append(seconds)
        median = statistics.median(self.recent) if len(self.recent) >= 10 else seconds
        if seconds > max(OUTLIER * median, LEAST_OUTLIER_S):
            logging.warning(
                "step=%d took %.2f s, %.2f s of it waiting for data; the median is %.2f s",
                step,
                seconds,
                wait_s,
                median,
            )
        self.recent = [*self.recent[-N_RECENT + 1 :], seconds]

    def read(self) -> dict[str, float]:
        """Returns the metrics since the last call; none if no step ended."""
        if not self.steps:
            return {}
        total = sum(self.steps)
        median = statistics.median(self.steps)
        found = {
            "stall/data_fraction": min(1.0, sum(self.waits) / total) if total > 0 else 0.0,
            "step_time/median_s": median,
            "step_time/max_s": max(self.steps),
        }
        self.waits, self.steps = [], []
        return found
