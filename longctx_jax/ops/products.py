"""Sums in float32: the accumulator's dtype, and an einsum that keeps it."""

import jax
import jax.numpy as jnp

from longctx_jax.ops.dispatch import platform
from longctx_jax.typing import DType


def accumulator(*arrays: jax.Array):
    """Returns the dtype sums are kept in: float32, or float64 when handed float64."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def product(spec: str, *operands: jax.Array, dtype: DType) -> jax.Array:
    """Returns an einsum summed in dtype, of operands in their own.

    XLA's CPU backend refuses some batched products of 16-bit inputs with 32-bit sums; there the
    operands are widened first, which is exact.
    """
    if platform() == "cpu":
        operands = tuple(x.astype(dtype) for x in operands)
    return jnp.einsum(spec, *operands, preferred_element_type=dtype)
