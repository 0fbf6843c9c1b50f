"""The order in which the (segment, layer) grid of cells runs: sequential, layerwise, diagonal.

    cell:  (layer_params, x, layer_cache)  ->  (y, layer_cache', aux)

Cell (s, l) needs y of (s, l-1) and the cache of (s-1, l), nothing else, so any order that respects
both gives the same values and gradients up to rounding. The diagonal schedule runs all cells of an
anti-diagonal s + l = t at once (Sivtsov et al. 2025, arXiv 2506.05229): S + L - 1 steps instead of
S L. The travelling value x and the caches are any pytrees; so is a layer's parameter tree.

A stack is homogeneous (one cell, parameters with a leading layer axis L) or patterned (a sequence
of P cells; then parameters and caches are sequences of P pytrees with a leading axis L / P, and
layer l = r P + p uses row r of position p).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.typing import PRNGKey, PyTree

Cell = Callable[..., tuple[PyTree, PyTree, PyTree]]
SCHEDULES = ("layerwise", "sequential", "diagonal")


def run_stack(
    cell: Cell | Sequence[Cell],
    params: PyTree,
    x_segments: PyTree,
    caches: PyTree,
    *,
    schedule: str = "sequential",
    key: PRNGKey | None = None,
    first_segment: int = 0,
    n_ramp_buckets: int = 4,
    unroll: int = 1,
) -> tuple[PyTree, PyTree, PyTree]:
    """Runs every cell of the grid once.

    Args:
        cell: the pure function of a layer, or one a pattern position.
        params: stacked layer parameters, leading axis L (patterned: a sequence of P, L / P each).
        x_segments: input of layer 0, leaves [S, ...].
        caches: stacked like params. None = empty and not wanted back, for S = 1 only.
        schedule: "sequential" (segments outside, layers inside), "layerwise" (layers outside) or
            "diagonal" (all cells of an anti-diagonal at once).
        key: if given, a cell is called with a fourth argument, a key folded from (segment,
            layer): the same in every schedule.
        first_segment: index of x_segments[0] in the stream, for the dropout keys.
        n_ramp_buckets: diagonal: how many widths the ramps are compiled for (`ramp_phases`).
        unroll: layers a loop iteration of sequential and layerwise: more compile time, less
            overhead.

    Returns:
        (y_segments, caches, aux): outputs of the last layer [S, ...], caches after segment S-1,
        and aux summed over segments, leaves with a leading layer axis, structured like params.

    Raises:
        ValueError: unknown schedule; unequal leading axes; caches=None with several segments.
    """
    if schedule not in SCHEDULES:
        raise ValueError(
            f"schedule must be one of {SCHEDULES}: got '{schedule}'; set config.model.schedule"
        )
    is_homogeneous = callable(cell)
    grid = _Grid(
        cells=(cell,) if is_homogeneous else tuple(cell),
        params=(params,) if is_homogeneous else tuple(params),
        n_segments=_leading_axis(x_segments, "x_segments"),
        key=key,
        first_segment=first_segment,
        unroll=unroll,
    )
    if caches is None:
        if grid.n_segments != 1:
            raise ValueError(
                f"several segments need caches to pass on: got caches=None and "
                f"{grid.n_segments} segments; make caches with init_cache"
            )
        caches = (None,) * len(grid.cells)
    elif is_homogeneous:
        caches = (caches,)
    caches = tuple(caches)

    if schedule == "layerwise" or grid.n_segments == 1:
        y, caches, aux = _layerwise(grid, x_segments, caches)
    elif schedule == "sequential":
        y, caches, aux = _sequential(grid, x_segments, caches)
    else:
        y, caches, aux = _diagonal(grid, x_segments, caches, n_ramp_buckets)
    return (y, caches[0], aux[0]) if is_homogeneous else (y, caches, aux)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The grid of cells: what all schedules share."""

    cells: tuple[Cell, ...]
    params: tuple[PyTree, ...]
    n_segments: int
    key: PRNGKey | None
    first_segment: int
    unroll: int

    def __post_init__(self):
        if len(self.params) != len(self.cells):
            raise ValueError(
                f"params must have one entry a pattern position: got {len(self.params)} for "
                f"{len(self.cells)} cells"
            )
        sizes = {_leading_axis(p, "params") for p in self.params}
        if len(sizes) != 1:
            raise ValueError(f"all layers of a pattern repeat equally often: got {sorted(sizes)}")

    @property
    def pattern_len(self) -> int:
        return len(self.cells)

    @property
    def n_repeats(self) -> int:
        return _leading_axis(self.params[0], "params")

    @property
    def n_layers(self) -> int:
        return self.pattern_len * self.n_repeats

    def call(self, position, params, x, cache, segment, layer):
        """Evaluates one cell; segment and layer are its (traced) coordinates, for its key."""
        if self.key is None:
            return self.cells[position](params, x, cache)
        segment_key = jax.random.fold_in(self.key, self.first_segment + segment)
        cell_key = jax.random.fold_in(segment_key, layer)
        return self.cells[position](params, x, cache, cell_key)


def _layerwise(grid: _Grid, x_segments, caches):
    """Layers outside, segments inside: with one segment, each layer takes the whole sequence."""

    def layer(position, params, xs, cache, layer_index):
        if grid.n_segments == 1:
            x = jax.tree.map(lambda leaf: leaf[0], xs)
            y, cache, aux = grid.call(position, params, x, cache, 0, layer_index)
            return jax.tree.map(lambda leaf: leaf[None], y), cache, aux

        def segment(cache, inputs):
            s, x = inputs
            y, cache, aux = grid.call(position, params, x, cache, s, layer_index)
            return cache, (y, aux)

        cache, (ys, aux) = jax.lax.scan(segment, cache, (jnp.arange(grid.n_segments), xs))
        return ys, cache, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), aux)

    return _scan_layers(grid, layer, x_segments, caches)


def _sequential(grid: _Grid, x_segments, caches):
    """Segments outside, layers inside."""

    def segment(carry, inputs):
        caches, total = carry
        s, x = inputs

        def layer(position, params, x, cache, layer_index):
            return grid.call(position, params, x, cache, s, layer_index)

        y, caches, aux = _scan_layers(grid, layer, x, caches)
        return (caches, _add(total, aux)), y

    zero_aux = _zero_aux(grid, x_segments, caches)
    inputs = (jnp.arange(grid.n_segments), x_segments)
    (caches, aux), ys = jax.lax.scan(segment, (caches, zero_aux), inputs)
    return ys, caches, aux


def _scan_layers(grid: _Grid, layer, x, caches):
    """Applies `layer` along the depth; returns (x, caches, aux), stacked per pattern position."""

    def repeat(x, inputs):
        r, params, caches = inputs
        new_caches, auxes = [], []
        for p in range(grid.pattern_len):
            x, cache, aux = layer(p, params[p], x, caches[p], r * grid.pattern_len + p)
            new_caches.append(cache)
            auxes.append(aux)
        return x, (tuple(new_caches), tuple(auxes))

    inputs = (jnp.arange(grid.n_repeats), grid.params, caches)
    unroll = min(grid.unroll, grid.n_repeats)
    x, (caches, aux) = jax.lax.scan(repeat, x, inputs, unroll=unroll)
    return x, caches, aux


def _diagonal(grid: _Grid, x_segments, caches, n_ramp_buckets: int):
    """A scan over anti-diagonals; on each, every layer works on its own segment at once.

    `slots[l]` is the input waiting for layer l, and slots[L] the newest output of the stack. In
    each phase only the rows [low, high) of the pattern can hold active cells, so only they run.
    """
    n_layers, pattern_len = grid.n_layers, grid.pattern_len
    slots = jax.tree.map(
        lambda leaf: jnp.zeros((n_layers + 1, *leaf.shape[1:]), leaf.dtype), x_segments
    )
    aux = _zero_aux(grid, x_segments, caches)
    outputs = []
    for phase in ramp_phases(grid.n_segments, grid.n_repeats, pattern_len, n_ramp_buckets):
        rows = slice(phase.low, phase.high)
        lanes = slice(phase.low * pattern_len, phase.high * pattern_len + 1)
        carry = (_take(slots, lanes), _take(caches, rows), _take(aux, rows))
        step = _diagonal_step(grid, phase, x_segments, _take(grid.params, rows))
        carry, emitted = jax.lax.scan(step, carry, jnp.arange(phase.start, phase.stop))
        slots = _put(slots, lanes, carry[0])
        caches, aux = _put(caches, rows, carry[1]), _put(aux, rows, carry[2])
        if phase.high == grid.n_repeats:
            n_early = max(0, n_layers - 1 - phase.start)  # steps before the first output
            outputs.append(_take(emitted, slice(n_early, None)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *outputs), caches, aux


def _diagonal_step(grid: _Grid, phase: "Phase", x_segments, params):
    """Returns the scan body of one phase: advance every lane of rows [low, high) by one cell."""
    pattern_len = grid.pattern_len
    rows = jnp.arange(phase.low, phase.high)

    def step(carry, t):
        slots, caches, aux = carry
        inputs = _take(slots, slice(0, -1))
        if phase.low == 0:
            newest = jnp.minimum(t, grid.n_segments - 1)
            inputs = jax.tree.map(
                lambda leaf, feed: leaf.at[0].set(feed[newest]), inputs, x_segments
            )
        outs, new_caches, new_aux = [], [], []
        for p in range(pattern_len):
            layers = rows * pattern_len + p
            segments = t - layers
            active = (segments >= 0) & (segments < grid.n_segments)
            x = jax.tree.map(lambda leaf, p=p: leaf[p::pattern_len], inputs)
            call = jax.vmap(lambda *args, p=p: grid.call(p, *args))
            y, cache, cell_aux = call(params[p], x, caches[p], jnp.maximum(segments, 0), layers)
            outs.append(y)
            new_caches.append(_where(active, cache, caches[p]))
            idle = jax.tree.map(jnp.zeros_like, cell_aux)
            new_aux.append(_add(aux[p], _where(active, cell_aux, idle)))
        y = jax.tree.map(lambda *leaves: _interleave(leaves), *outs)
        # The first slot is fed from outside (low = 0) or never read again (low > 0).
        slots = jax.tree.map(lambda old, new: jnp.concatenate([old[:1], new]), slots, y)
        emitted = jax.tree.map(lambda leaf: leaf[-1], slots)
        return (slots, tuple(new_caches), tuple(new_aux)), emitted

    return step


@dataclasses.dataclass(frozen=True)
class Phase:
    """Diagonals start <= t < stop, on which only pattern rows low <= r < high can be active."""

    start: int
    stop: int
    low: int
    high: int


def ramp_phases(
    n_segments: int, n_repeats: int, pattern_len: int = 1, n_buckets: int = 4
) -> list[Phase]:
    """Returns the phases of the diagonal schedule, in order.

    Running all L layers on all S + L - 1 diagonals wastes (L - 1) / S of the useful work on the
    ramps. Here each ramp is cut into n_buckets pieces, each compiled for its own width, and the
    waste falls to about L / (n_buckets S) at the price of 2 n_buckets + 1 compiled bodies.
    """
    n_layers = n_repeats * pattern_len
    n_steps = n_segments + n_layers - 1
    piece = pattern_len * max(1, -(-n_repeats // max(1, n_buckets)))
    ramp = min(n_layers, n_segments) - 1
    cuts = {0, n_steps, *range(0, ramp, piece), *range(n_steps, n_steps - ramp, -piece)}
    if n_segments < n_layers:  # the window of active layers slides without ever being full
        cuts |= set(range(ramp, n_steps - ramp, piece))
    cuts |= {ramp, n_steps - ramp}
    cuts = sorted(cuts)
    phases: list[Phase] = []
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        low = max(0, start - n_segments + 1) // pattern_len
        high = -(-(min(n_layers - 1, stop - 1) + 1) // pattern_len)
        if phases and (phases[-1].low, phases[-1].high) == (low, high):
            phases[-1] = dataclasses.replace(phases[-1], stop=stop)
        else:
            phases.append(Phase(start, stop, low, high))
    return phases


def diagonal_cells(
    n_segments: int, n_repeats: int, pattern_len: int = 1, n_buckets: int = 4
) -> int:
    """Returns how many cells the diagonal schedule evaluates, idle ones included."""
    phases = ramp_phases(n_segments, n_repeats, pattern_len, n_buckets)
    return sum((p.stop - p.start) * (p.high - p.low) * pattern_len for p in phases)


def _zero_aux(grid: _Grid, x_segments, caches):
    """Zeros of the shape of the layers' aux, stacked per pattern position."""

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


def _leading_axis(tree: Any, name: str) -> int:
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
    if len(sizes) != 1:
        raise ValueError(
            f"every leaf of {name} must have the same leading axis: got {sorted(sizes)}"
        )
    return sizes.pop()


def _take(tree, index: slice):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _put(tree, index: slice, rows):
    return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), tree, rows)


def _add(left, right):
    return jax.tree.map(jnp.add, left, right)


def _where(active, new, old):
    def select(new, old):
        return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(select, new, old)


def _interleave(leaves):
    """[row, ...] a pattern position -> [row * pattern_len + position, ...]."""
    stacked = jnp.stack(leaves, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])
