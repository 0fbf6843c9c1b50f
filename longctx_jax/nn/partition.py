"""Where activations lie on the devices of the mesh in use, if there is one."""

import jax
from jax.sharding import PartitionSpec

ROWS, TOKENS = "data", "sequence"  # mesh axes over which activations are spread


def spread_tokens(x: jax.Array) -> jax.Array:
    """Returns x [batch, seq, ...] with rows over the mesh axis "data", tokens over "sequence".

    Beside activations that lie like this, weights that are spread over "data" are gathered for
    their product, instead of the activations. Axes that the mesh lacks, that a size is no multiple
    of, or that a surrounding `shard_map` has taken over are left out; without a mesh, x is as it
    was.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    free = set(mesh.auto_axes)
    axes = [
        name if name in free and size % mesh.shape[name] == 0 else None
        for name, size in zip((ROWS, TOKENS), x.shape, strict=False)
    ]
    if axes == [None, None]:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def everywhere(x: jax.Array) -> jax.Array:
    """Returns x whole on every device of the mesh in use, so that each process can read it."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())
