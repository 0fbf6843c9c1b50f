"""Kernels on a mesh: each device runs its own rows and heads, since XLA cannot cut a kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

AXES = {"b": "data", "h": "model"}  # letter of a dimension -> mesh axis that shares it out


def by_rows_and_heads(
    run: Callable[..., Any], arrays: Sequence[Any], dims: Sequence[str], out_dims: Sequence[str]
) -> Any:
    """Returns run(*arrays), computed on every device of the mesh in use for its rows and heads.

    Without a mesh, and where an axis divides not all that it would share out, nothing is cut along
    it. Rows and heads must not need each other.

    Args:
        run: of local arrays, returns a tuple.
        arrays: some may be None.
        dims: of each array, a letter a dimension: "b" rows, "h" heads, "." whole.
        out_dims: the same of the results.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes: dict[str, list[int]] = {letter: [] for letter in AXES}
    for array, letters in zip(arrays, dims, strict=True):
        if array is not None:
            for size, letter in zip(array.shape, letters, strict=True):
                sizes.get(letter, []).append(size)
    used = {
        letter: name
        for letter, name in AXES.items()
        if not mesh.empty
        and name in mesh.auto_axes
        and mesh.shape[name] > 1
        and all(size % mesh.shape[name] == 0 for size in sizes[letter])
    }
    if not used:
        return run(*arrays)

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(used.get(letter) for letter in letters))

    mapped = jax.shard_map(
        run,
        in_specs=tuple(map(spec, dims)),
        out_specs=tuple(map(spec, out_dims)),
        axis_names=set(used.values()),
        check_vma=False,  # a kernel says nothing of axes
    )
    return mapped(*arrays)


def by_rows(run: Callable[..., Any], rows: Any, whole: Any) -> Any:
    """Returns run(rows, whole), computed on every device of the mesh in use for its rows.

    Without a mesh, or where it divides not all rows, nothing is cut.

    Args:
        run: of local arrays; every array it returns has leading rows.
        rows: a pytree of arrays that all have leading rows.
        whole: a pytree of arrays that every device needs.
    """
    mesh, axis = jax.sharding.get_abstract_mesh(), AXES["b"]
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(rows)}
    is_spread = not mesh.empty and axis in mesh.auto_axes and mesh.shape[axis] > 1
    if not is_spread or any(size % mesh.shape[axis] for size in sizes):
        return run(rows, whole)
    spec = PartitionSpec(axis)
    mapped = jax.shard_map(
        run,
        in_specs=(spec, PartitionSpec()),
        out_specs=spec,
        axis_names={axis},
        check_vma=False,
    )
    return mapped(rows, whole)
