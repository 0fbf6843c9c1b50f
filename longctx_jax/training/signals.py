"""SIGTERM and SIGINT as a wish to stop, which the training loop grants between two steps."""

import contextlib
import dataclasses
import signal
from collections.abc import Iterator


@dataclasses.dataclass
class Stop:
    """Which signal asked to stop; empty = none."""

    signal_name: str = ""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """SIGTERM and SIGINT fill the Stop in; the same signal again acts as it used to."""
    stop = Stop()
    before = {}

    def handle(number, frame):
        del frame
        stop.signal_name = signal.Signals(number).name
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
