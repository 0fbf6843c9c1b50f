"""The diagonal schedule: all cells of an anti-diagonal at once, on one device or on several.

Cells (s, l) with s + l = t depend on cells of diagonal t - 1 alone. Layer l works on segment t - l:
every layer has its own segment in hand, and hands it up after each step.

Source: Sivtsov et al. (2025), arXiv 2506.05229.
"""

import dataclasses

import jax
import jax.numpy as jnp

from longctx_jax.models.schedules.grid import Grid, add, zero_aux


def diagonal(grid: Grid, x_segments, caches, n_ramp_buckets: int):
    """A scan over anti-diagonals; on each, every layer works on its own segment at once.

    `slots[l]` is the input waiting for layer l, and slots[L] the newest output of the stack. In
    each phase only the rows [low, high) of the pattern can hold active cells, so only they run.
    """
    n_layers, pattern_len = grid.n_layers, grid.pattern_len
    slots = jax.tree.map(
        lambda leaf: jnp.zeros((n_layers + 1, *leaf.shape[1:]), leaf.dtype), x_segments
    )
    aux = zero_aux(grid, x_segments, caches)
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


def _diagonal_step(grid: Grid, phase: "Phase", x_segments, params):
    """Returns the scan body of one phase: advance every lane of rows [low, high) by one cell."""
    rows = jnp.arange(phase.low, phase.high)

    def step(carry, t):
        slots, caches, aux = carry
        inputs = _take(slots, slice(0, -1))
        if phase.low == 0:
            inputs = _feed(grid, inputs, x_segments, t)
        y, caches, aux = _advance(grid, rows, params, inputs, caches, aux, t)
        # The first slot is fed from outside (low = 0) or never read again (low > 0).
        slots = jax.tree.map(lambda old, new: jnp.concatenate([old[:1], new]), slots, y)
        emitted = jax.tree.map(lambda leaf: leaf[-1], slots)
        return (slots, caches, aux), emitted

    return step


def _feed(grid: Grid, inputs, x_segments, t):
    """The inputs with the segment that enters layer 0 on diagonal t."""
    newest = jnp.minimum(t, grid.n_segments - 1)
    return jax.tree.map(lambda leaf, feed: leaf.at[0].set(feed[newest]), inputs, x_segments)


def _advance(grid: Grid, rows, params, inputs, caches, aux, t):
    """Runs one cell in every lane of these pattern rows; idle ones change nothing."""
    pattern_len = grid.pattern_len
    outs, new_caches, new_aux = [], [], []
    for p in range(pattern_len):
        layers = rows * pattern_len + p
        segments = t - layers
        active = grid.is_active(segments)
        x = jax.tree.map(lambda leaf, p=p: leaf[p::pattern_len], inputs)
        call = jax.vmap(lambda *args, p=p: grid.call(p, *args))
        y, cache, cell_aux = call(params[p], x, caches[p], jnp.maximum(segments, 0), layers)
        outs.append(y)
        new_caches.append(_where(active, cache, caches[p]))
        idle = jax.tree.map(jnp.zeros_like, cell_aux)
        new_aux.append(add(aux[p], _where(active, cell_aux, idle)))
    y = jax.tree.map(lambda *leaves: _interleave(leaves), *outs)
    return y, tuple(new_caches), tuple(new_aux)


def pipeline(grid: Grid, x_segments, caches, layer_axis: str):
    """The diagonal schedule with the layers spread over the devices of a mesh axis.

    Each device keeps its layers' parameters and caches, runs its part of every diagonal, and hands
    its last layer's output to the next device: exact pipeline parallelism in which a segment is a
    micro-batch. Devices without work in the ramps wait, as in any pipeline: n_layers - 1 of the
    S + n_layers - 1 steps.

    Args:
        layer_axis: of the mesh set by `jax.set_mesh`; parameters and caches should be sharded over
            it along their leading axis (others are moved), x_segments over other axes at most.

    Raises:
        ValueError: no such mesh axis, or it does not divide the pattern's repeats.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if layer_axis not in mesh.axis_names:
        raise ValueError(
            f"layer_axis must be an axis of the mesh: got {layer_axis!r} and {mesh.axis_names}; "
            "run inside `with jax.set_mesh(mesh)`"
        )
    n_devices = mesh.shape[layer_axis]
    if grid.n_repeats % n_devices:
        raise ValueError(
            f"the mesh axis {layer_axis!r} must divide the repeats of the pattern: got "
            f"{n_devices} devices and {grid.n_repeats} repeats; choose a divisor"
        )
    n_local = grid.n_repeats // n_devices
    n_lanes = n_local * grid.pattern_len
    ring = [(d, (d + 1) % n_devices) for d in range(n_devices)]

    def run(params, x_segments, caches, aux):
        device = jax.lax.axis_index(layer_axis)
        rows = device * n_local + jnp.arange(n_local)
        waiting = jax.tree.map(
            lambda leaf: jnp.zeros((n_lanes, *leaf.shape[1:]), leaf.dtype), x_segments
        )

        def step(carry, t):
            waiting, caches, aux = carry
            fed = _feed(grid, waiting, x_segments, t)
            inputs = jax.tree.map(lambda a, b: jnp.where(device == 0, a, b), fed, waiting)
            y, caches, aux = _advance(grid, rows, params, inputs, caches, aux, t)
            last = jax.tree.map(lambda leaf: leaf[-1], y)
            handed = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, layer_axis, ring), last)
            waiting = jax.tree.map(
                lambda first, rest: jnp.concatenate([first[None], rest[:-1]]), handed, y
            )
            return (waiting, caches, aux), last

        n_steps = grid.n_segments + grid.n_layers - 1
        carry, last = jax.lax.scan(step, (waiting, caches, aux), jnp.arange(n_steps))
        # Only the last device's are outputs of the stack; the new axis says whose is whose.
        last = jax.tree.map(lambda leaf: leaf[None, grid.n_layers - 1 :], last)
        return last, carry[1], carry[2]

    split, whole = jax.sharding.PartitionSpec(layer_axis), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        run,
        in_specs=(split, whole, split, split),
        out_specs=split,
        axis_names={layer_axis},
        check_vma=False,  # cells start scans from constants, which vary over no axis
    )
    aux = zero_aux(grid, x_segments, caches)
    y, caches, aux = mapped(grid.params, x_segments, caches, aux)
    return jax.tree.map(lambda leaf: leaf[-1], y), caches, aux


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


def _take(tree, index: slice):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _put(tree, index: slice, rows):
    return jax.tree.map(lambda leaf, new: leaf.at[index].set(new), tree, rows)


def _where(active, new, old):
    def select(new, old):
        return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(select, new, old)


def _interleave(leaves):
    """[row, ...] a pattern position -> [row * pattern_len + position, ...]."""
    stacked = jnp.stack(leaves, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])
