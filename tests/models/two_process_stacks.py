"""One of two processes that decode together: python -m tests.models.two_process_stacks ID PORT.

Each has one CPU device and one of two stacks. Prints the largest difference from the logits that
one process gets.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.models.stagformer.lanes import place_stacks
from tests.models.test_stagformer import BATCH, SEQ, TOKENS, make, with_options


def main(process: int, port: str) -> None:
    """Decodes token by token over the devices of both processes."""
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    model, variables = make("separate", "float32")
    expected = model.apply(variables, TOKENS).logits
    spread = with_options(model, stack_axis="stack")
    mesh = jax.make_mesh((2,), ("stack",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def decode(variables, tokens):
        def step(cache, token):
            out = spread.apply(variables, token[:, None], cache)
            return out.cache, out.logits[:, 0]

        _, logits = jax.lax.scan(step, spread.init_cache(BATCH, SEQ), tokens.T)
        return jnp.moveaxis(logits, 0, 1)

    with jax.set_mesh(mesh):
        placed = place_stacks(spread.config, variables, mesh)
        found = jax.jit(decode, out_shardings=whole)(placed, jax.device_put(TOKENS, whole))
    worst = np.max(np.abs(np.asarray(found.addressable_data(0)) - np.asarray(expected)))
    print(f"devices={jax.device_count()} processes={jax.process_count()} worst={worst:.3e}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
