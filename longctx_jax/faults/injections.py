"""What is done to a run from inside its own process, or to its files."""

import os
import pathlib
import random
import time
from collections.abc import Callable, Sequence

Inject = Callable[[], None]


def flip_bit(path: pathlib.Path) -> None:
    """Flips a bit in the middle."""
    data = bytearray(path.read_bytes())
    if data:
        data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: pathlib.Path) -> None:
    """Leaves the first half."""
    os.truncate(path, path.stat().st_size // 2)


DAMAGES: dict[str, Callable[[pathlib.Path], None]] = {
    "flipped": flip_bit,
    "cut": cut,
    "gone": pathlib.Path.unlink,
}


def change_batches(change: Callable[[int, dict], dict]) -> Inject:
    """Puts change(step, batch) in the place of every batch, as it is read."""

    def inject():
        from longctx_jax.training import loop

        make = loop.make_iterator

        def make_iterator(dataset, start, n_workers):
            return make(dataset.map_with_index(change), start, n_workers)

        loop.make_iterator = make_iterator

    return inject


def call_at(step: int, action: Callable[[], None]) -> Inject:
    """Calls action as the batch of a step is read."""

    def spy(index, batch):
        if index == step:
            action()
        return batch

    return change_batches(spy)


def raise_at(step: int) -> Inject:
    """The thread that reads the batch of a step fails."""

    def fail():
        raise RuntimeError("the reader died")

    return call_at(step, fail)


def hang_at(step: int) -> Inject:
    """The thread that reads the batch of a step never comes back."""
    return call_at(step, lambda: time.sleep(1e6))


def nan_at(step: int) -> Inject:
    """The weights of a batch's losses are NaN, and so is the gradient."""

    def spoil(index, batch):
        if index != step:
            return batch
        return {**batch, "weights": batch["weights"] * float("nan")}

    return change_batches(spoil)


def jumping_clock(steps: Sequence[int]) -> Inject:
    """The wall clock is put up to a day off, anew as the batch of each of these steps is read."""
    chance, off_s = random.Random(0), [0.0]

    def inject():
        now, now_ns = time.time, time.time_ns
        time.time = lambda: now() + off_s[0]
        time.time_ns = lambda: now_ns() + int(off_s[0] * 1e9)

        def jump():
            off_s[0] = chance.uniform(-86_400, 86_400)

        for step in steps:
            call_at(step, jump)()

    return inject
