"""Every suite by the name that scripts.benchmark knows it by: the only list of them."""

from longctx_jax.benchmarking import decay, decode, recurrent_memory, train, vq
from longctx_jax.benchmarking.suite import Suite

SUITES: dict[str, Suite] = {
    "train": train.SUITE,
    "decode": decode.SUITE,
    "decay": decay.SUITE,
    "vq": vq.SUITE,
    "memory": recurrent_memory.SUITE,
}
