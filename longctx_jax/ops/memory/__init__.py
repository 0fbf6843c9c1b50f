"""Associative memory: a matrix written by a delta rule and read with non-negative features."""

from longctx_jax.ops.memory.associative import (
    EPS,
    MemoryState,
    Written,
    associative_read,
    associative_write,
    init_memory_state,
)
from longctx_jax.ops.memory.features import dpfp, n_features

__all__ = [
    "EPS",
    "MemoryState",
    "Written",
    "associative_read",
    "associative_write",
    "dpfp",
    "init_memory_state",
    "n_features",
]
