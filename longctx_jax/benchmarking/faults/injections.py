"""What is done to a run from inside its own process, or to its files."""

import os
import pathlib
import random
import time
from collections.abc import Callable

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


def call_at(step: int, action: Callable[[], None]) -> Inject:
    """Calls action as the batch of a step is read."""

    def inject():
        from longctx_jax.training import loop

        make = loop.make_iterator

        def make_iterator(dataset, start, n_workers):
            def spy(index, batch):
                if index == step:
                    action()
                return batch

            return make(dataset.map_with_index(spy), start, n_workers)

        loop.make_iterator = make_iterator

    return inject


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

    def inject():
        from longctx_jax.training import loop

        make = loop.make_iterator

        def make_iterator(dataset, start, n_workers):
            def spy(index, batch):
                if index != step:
                    return batch
                return {**batch, "weights": batch["weights"] * float("nan")}

            return make(dataset.map_with_index(spy), start, n_workers)

        loop.make_iterator = make_iterator

    return inject


def jumping_clock() -> None:
    """The wall clock is up to a day off, differently each time."""
    chance, now, now_ns = random.Random(0), time.time, time.time_ns

    def jump() -> float:
        return chance.uniform(-86_400, 86_400)

    time.time = lambda: now() + jump()
    time.time_ns = lambda: now_ns() + int(jump() * 1e9)
