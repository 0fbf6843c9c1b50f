"""A sequence spread over devices: each takes its part through a layer, and hands on the cache.

Device d holds segments d m .. d m + m - 1 of every layer's input. At step t it runs repeat t - d of
the pattern over them, one after another, from the caches that device d - 1 left behind its own part
of the same repeat a step before. So the split law makes the result exact for every mixer that has a
cache: a device hands on a state of constant size (decay, VQ, Mamba, RWKV, associative memory) or
the keys and values so far (softmax).

Cost on n devices: R + n - 1 steps for R repeats, of which each device works in R; one message of
the caches of P layers a step. Activations and their gradients take 1/n of the memory.
"""

import jax
import jax.numpy as jnp

from longctx_jax.models.schedules.grid import Grid, zero_aux


def relay(grid: Grid, x_segments, caches, sequence_axis: str):
    """Runs the grid with segments spread over the devices of a mesh axis.

    Args:
        sequence_axis: of the mesh set by `jax.set_mesh`; it divides the number of segments.

    Raises:
        ValueError: no such mesh axis, or it does not divide the segments.
    """
    n_devices = axis_size(sequence_axis)
    if grid.n_segments % n_devices:
        raise ValueError(
            f"the mesh axis {sequence_axis!r} must divide the segments of a call: got {n_devices} "
            f"devices and {grid.n_segments} segments; change config.mesh.sequence, "
            "config.data.seq_len or the segments' length"
        )
    n_local = grid.n_segments // n_devices
    chain = [(d, d + 1) for d in range(n_devices - 1)]

    def run(params, xs, caches, aux):
        device = jax.lax.axis_index(sequence_axis)
        segments = device * n_local + jnp.arange(n_local)

        def step(carry, t):
            xs, handed, caches, aux = carry
            repeat = t - device
            is_active = (repeat >= 0) & (repeat < grid.n_repeats)
            row = jnp.clip(repeat, 0, grid.n_repeats - 1)
            here, own = _row((params, caches), row)
            start = _where(device == 0, own, handed)
            ys, left, new_aux = _repeat(grid, here, segments, xs, start, row)
            # Idle devices compute something too: it takes no time that others do not need anyway.
            caches = _set_row(caches, row, _where(is_active, left, own))
            new_aux = jax.tree.map(lambda leaf: jnp.where(is_active, leaf, 0), new_aux)
            aux = jax.tree.map(lambda total, leaf: total.at[row].add(leaf), aux, new_aux)
            handed = jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, sequence_axis, chain), left)
            return (_where(is_active, ys, xs), handed, caches, aux), None

        handed = jax.tree.map(jnp.zeros_like, _row(caches, 0))
        n_steps = grid.n_repeats + n_devices - 1
        carry, _ = jax.lax.scan(step, (xs, handed, caches, aux), jnp.arange(n_steps))
        xs, _, caches, aux = carry
        # Only the last device's caches are those behind the sequence; a new axis says whose is
        # whose.
        caches = jax.tree.map(lambda leaf: leaf[None], caches)
        return xs, caches, jax.lax.psum(aux, sequence_axis)

    split, whole = jax.sharding.PartitionSpec(sequence_axis), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(
        run,
        in_specs=(whole, split, whole, whole),
        out_specs=(split, split, whole),
        axis_names={sequence_axis},
        check_vma=False,  # cells start scans from constants, which vary over no axis
    )
    aux = zero_aux(grid, x_segments, caches)
    xs, caches, aux = mapped(grid.params, x_segments, caches, aux)
    return xs, jax.tree.map(lambda leaf: leaf[-1], caches), aux


def axis_size(sequence_axis: str) -> int:
    """Returns the devices along a mesh axis; ValueError outside of a mesh that has it."""
    mesh = jax.sharding.get_abstract_mesh()
    if sequence_axis not in mesh.axis_names:
        raise ValueError(
            f"sequence_axis must be an axis of the mesh: got {sequence_axis!r} and "
            f"{mesh.axis_names}; run inside `with jax.set_mesh(mesh)`"
        )
    return mesh.shape[sequence_axis]


def _repeat(grid: Grid, params, segments, xs, caches, row):
    """Takes the local segments through one repeat of the pattern: (ys, caches, aux)."""
    new_caches, auxes = [], []
    for p in range(grid.pattern_len):
        layer = row * grid.pattern_len + p

        def cell(cache, inputs, p=p, layer=layer):
            s, x = inputs
            y, cache, aux = grid.call(p, params[p], x, cache, s, layer)
            return cache, (y, aux)

        cache, (xs, aux) = jax.lax.scan(cell, caches[p], (segments, xs))
        new_caches.append(cache)
        auxes.append(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), aux))
    return xs, tuple(new_caches), tuple(auxes)


def _row(tree, row):
    return jax.tree.map(lambda leaf: leaf[row], tree)


def _set_row(tree, row, new):
    return jax.tree.map(lambda leaf, value: leaf.at[row].set(value), tree, new)


def _where(condition, new, old):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
