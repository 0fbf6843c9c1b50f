"""Array aliases used in signatures: jaxtyping's kinds, `PyTree`, `PRNGKey` and `DType`."""

from typing import Any

import jax
from jax.typing import DTypeLike as DType
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
PRNGKey = jax.Array

__all__ = ["Array", "Bool", "DType", "Float", "Int", "PRNGKey", "PyTree"]
