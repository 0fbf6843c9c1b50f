"""The (segment, layer) grid of cells: its cells, its sizes, and how one of them is called."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.typing import PRNGKey, PyTree

Cell = Callable[..., tuple[PyTree, PyTree, PyTree]]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid of cells: what all schedules share."""

    cells: tuple[Cell, ...]
    params: tuple[PyTree, ...]
    n_segments: int
    key: PRNGKey | None
    first_segment: int
    unroll: int
    n_active: jax.Array | None = None  # segments that count, int32 []; None = all

    def __post_init__(self):
        if len(self.params) != len(self.cells):
            raise ValueError(
                f"params must have one entry a pattern position: got {len(self.params)} for "
                f"{len(self.cells)} cells"
            )
        sizes = {leading_axis(p, "params") for p in self.params}
        if len(sizes) != 1:
            raise ValueError(f"all layers of a pattern repeat equally often: got {sorted(sizes)}")

    @property
    def pattern_len(self) -> int:
        """Layers of one repeat of the pattern."""
        return len(self.cells)

    @property
    def n_repeats(self) -> int:
        """Repeats of the pattern."""
        return leading_axis(self.params[0], "params")

    @property
    def n_layers(self) -> int:
        """Layers of the stack."""
        return self.pattern_len * self.n_repeats

    def call(self, position, params, x, cache, segment, layer):
        """Evaluates one cell; segment and layer are its (traced) coordinates, for its key."""
        if self.key is None:
            return self.cells[position](params, x, cache)
        segment_key = jax.random.fold_in(self.key, self.first_segment + segment)
        cell_key = jax.random.fold_in(segment_key, layer)
        return self.cells[position](params, x, cache, cell_key)

    def call_if_active(self, position, params, x, cache, segment, layer):
        """`call`, or nothing for a segment that does not count: its output is then zeros."""
        if self.n_active is None:
            return self.call(position, params, x, cache, segment, layer)

        def run(x, cache):
            return self.call(position, params, x, cache, segment, layer)

        def skip(x, cache):
            y, _, aux = jax.eval_shape(run, x, cache)
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (y, aux))
            return zeros[0], cache, zeros[1]

        return jax.lax.cond(segment < self.n_active, run, skip, x, cache)

    def is_active(self, segments: jax.Array) -> jax.Array:
        """Returns which of these places along the sequence are segments that count."""
        n_active = self.n_segments if self.n_active is None else self.n_active
        return (segments >= 0) & (segments < n_active)


def zero_aux(grid: Grid, x_segments: PyTree, caches: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
    """Returns zeros of the shape of the layers' aux, stacked per pattern position."""

    def one_segment(params, x, caches):
        x = jax.tree.map(lambda leaf: leaf[0], x)
        auxes = []
        for p in range(grid.pattern_len):
            row = jax.tree.map(lambda leaf: leaf[0], (params[p], caches[p]))
            x, _, aux = grid.call(p, row[0], x, row[1], 0, p)
            auxes.append(aux)
        return tuple(auxes)

    shapes = jax.eval_shape(one_segment, grid.params, x_segments, caches)
    return jax.tree.map(lambda s: jnp.zeros((grid.n_repeats, *s.shape), s.dtype), shapes)


def leading_axis(tree: Any, name: str) -> int:
    """Returns the size of the leading axis that all leaves share; ValueError if they do not."""
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1:
        raise ValueError(
            f"every leaf of {name} must have the same leading axis: got {sorted(sizes)}"
        )
    return sizes.pop()


def add(left: PyTree, right: PyTree) -> PyTree:
    """Returns the sum, leaf by leaf."""
    return jax.tree.map(jnp.add, left, right)
