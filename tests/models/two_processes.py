"""One of two processes that run a pipeline together: python -m tests.models.two_processes ID PORT.

Each has two CPU devices; the four layers of a small stack lie on four devices. Prints the largest
difference from the sequential schedule, in the values that this process holds.
"""

import sys

import jax
import numpy as np

from longctx_jax.models.schedules import run_stack
from tests.models.test_pipeline import cell, make_inputs


def main(process: int, port: str) -> None:
    """Runs the diagonal schedule over the devices of both processes."""
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    params, x, caches = make_inputs(4)
    expected = run_stack(cell, params, x, caches, schedule="sequential")
    mesh = jax.make_mesh((4,), ("layers",), axis_types=(jax.sharding.AxisType.Auto,))

    def put(tree, *axes):
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        return jax.tree.map(
            lambda a: jax.make_array_from_callback(a.shape, sharding, lambda at, a=a: a[at]), tree
        )

    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda *inputs: run_stack(cell, *inputs, schedule="diagonal", layer_axis="layers")
        )
        found = run(put(params, "layers"), put(x), put(caches, "layers"))
    worst = 0.0
    for actual, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        for shard in actual.addressable_shards:
            here = np.asarray(wanted)[shard.index]
            worst = max(worst, float(np.max(np.abs(np.asarray(shard.data) - here))))
    print(f"devices={jax.device_count()} processes={jax.process_count()} worst={worst:.3e}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
