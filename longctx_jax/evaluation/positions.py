"""Bits per byte by position: how much a token gains from all that stands before it."""

from collections.abc import Sequence

import numpy as np

from longctx_jax.ops.losses import bits_per_byte


def doubling_edges(length: int, first: int = 128) -> tuple[int, ...]:
    """Returns 0, first, 2 first, 4 first, .. and `length` at the end."""
    edges = [0]
    edge = first
    while edge < length:
        edges.append(edge)
        edge *= 2
    return (*edges, length)


class PositionCurve:
    """Adds up nats and bytes by position in the stripe, in constant memory: `evaluate`'s `observe`.

    Attributes:
        edges: positions, rising; interval i is edges[i] <= position < edges[i + 1]. A token's
            position is the number of tokens from its stripe's start to the one it is read from, so
            it is predicted from position + 1 tokens (of one document, where the text has several).
    """

    def __init__(self, edges: Sequence[int]) -> None:
        """Starts at zero.

        Raises:
            ValueError: if edges do not rise, or make no interval.
        """
        self.edges = np.asarray(edges)
        if len(edges) < 2 or np.any(np.diff(self.edges) <= 0):
            raise ValueError(f"edges must be at least two, rising: got {tuple(edges)}")
        self.nats = np.zeros(len(edges) - 1)
        self.n_bytes = np.zeros(len(edges) - 1, np.int64)

    def __call__(self, first: int, nll: np.ndarray, target_bytes: np.ndarray) -> None:
        """Adds a window: nats and raw bytes of its targets [rows, seq], the first at `first`."""
        positions = first + np.arange(nll.shape[1])
        intervals = np.searchsorted(self.edges, positions, side="right") - 1
        inside = (intervals >= 0) & (intervals < self.nats.size)
        np.add.at(self.nats, intervals[inside], np.sum(nll, axis=0)[inside])
        np.add.at(self.n_bytes, intervals[inside], np.sum(target_bytes, axis=0)[inside])

    def bits_per_byte(self) -> list[float | None]:
        """Returns the bits per byte of each interval, None where no byte was seen."""
        sums = zip(self.nats.tolist(), self.n_bytes.tolist(), strict=True)
        return [bits_per_byte(nats, n_bytes) if n_bytes else None for nats, n_bytes in sums]
