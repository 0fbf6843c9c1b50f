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

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from longctx_jax.models.schedules.context_parallel import relay
from longctx_jax.models.schedules.diagonal import diagonal, pipeline
from longctx_jax.models.schedules.grid import Cell, Grid, add, leading_axis, zero_aux
from longctx_jax.nn.ring_lending import at_layer, keep_whole
from longctx_jax.typing import PRNGKey, PyTree

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
    layer_axis: str = "",
    sequence_axis: str = "",
    n_active: jax.Array | None = None,
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
        layer_axis: diagonal: mesh axis over which the layers are spread (`diagonal.pipeline`);
            a single segment goes through them one after another all the same.
        sequence_axis: mesh axis over which the segments are spread (`relay.relay`), whatever the
            schedule; a single segment is not.
        n_active: int32 [], may be traced: segments from here on are padding, so that one compiled
            program serves all lengths up to S. They change no cache, count in no aux, and their
            outputs mean nothing; None = all S count.

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
    grid = Grid(
        cells=(cell,) if is_homogeneous else tuple(cell),
        params=(params,) if is_homogeneous else tuple(params),
        n_segments=leading_axis(x_segments, "x_segments"),
        key=key,
        first_segment=first_segment,
        unroll=unroll,
        n_active=n_active,
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

    if layer_axis and schedule != "diagonal":
        raise ValueError(
            f"layer_axis needs the diagonal schedule: got {layer_axis!r} and schedule="
            f"{schedule!r}; set config.model.schedule"
        )
    if sequence_axis and (layer_axis or n_active is not None):
        raise ValueError(
            f"sequence_axis={sequence_axis!r} goes with neither layer_axis nor n_active: got "
            f"layer_axis={layer_axis!r}, n_active={n_active}; spread one of them"
        )
    if sequence_axis and grid.n_segments > 1:
        y, caches, aux = relay(grid, x_segments, caches, sequence_axis)
    elif layer_axis and grid.n_segments > 1:
        y, caches, aux = pipeline(grid, x_segments, caches, layer_axis)
    elif schedule == "layerwise" or grid.n_segments == 1:
        y, caches, aux = _layerwise(grid, x_segments, caches)
    elif schedule == "sequential":
        y, caches, aux = _sequential(grid, x_segments, caches)
    else:
        y, caches, aux = diagonal(grid, x_segments, caches, n_ramp_buckets)
    return (y, caches[0], aux[0]) if is_homogeneous else (y, caches, aux)


def _layerwise(grid: Grid, x_segments, caches):
    """Layers outside, segments inside: with one segment, each layer takes the whole sequence."""

    def layer(position, params, xs, cache, layer_index):
        if grid.n_segments == 1:
            x = jax.tree.map(lambda leaf: leaf[0], xs)
            y, cache, aux = grid.call_if_active(position, params, x, cache, 0, layer_index)
            return jax.tree.map(lambda leaf: leaf[None], y), cache, aux

        def segment(cache, inputs):
            s, x = inputs
            y, cache, aux = grid.call_if_active(position, params, x, cache, s, layer_index)
            return cache, (y, aux)

        cache, (ys, aux) = jax.lax.scan(segment, cache, (jnp.arange(grid.n_segments), xs))
        return ys, cache, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), aux)

    return _scan_layers(grid, layer, x_segments, caches)


def _sequential(grid: Grid, x_segments, caches):
    """Segments outside, layers inside."""

    def segment(carry, inputs):
        caches, total = carry
        s, x = inputs

        def layer(position, params, x, cache, layer_index):
            return grid.call_if_active(position, params, x, cache, s, layer_index)

        y, caches, aux = _scan_layers(grid, layer, x, caches)
        return (caches, add(total, aux)), y

    inputs = (jnp.arange(grid.n_segments), x_segments)
    start = (caches, zero_aux(grid, x_segments, caches))
    (caches, aux), ys = jax.lax.scan(segment, start, inputs)
    return ys, caches, aux


def _scan_layers(grid: Grid, layer, x, caches):
    """Applies `layer` along the depth; returns (x, caches, aux), stacked per pattern position."""
    caches, whole = keep_whole(caches)

    def repeat(x, inputs):
        r, params, caches = inputs
        caches = at_layer(caches, whole, r)
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
