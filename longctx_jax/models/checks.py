"""What a call of a model must fit together to be: one error for every model, before anything runs.

Shapes and dtypes are known when tracing and always checked. Values are checked where they are known
(outside jit), for segment ids; a token id outside the vocabulary is embedded as NaN instead.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def require_precision(dtype: str) -> None:
    """Raises ValueError if the model's dtype would silently become another one."""
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ValueError(
            f"config.model.dtype={dtype!r} needs 64-bit types, and JAX has them off: it would "
            "compute in float32; set jax.config.update('jax_enable_x64', True) or "
            "JAX_ENABLE_X64=1, or use 'float32'"
        )


def require_call(
    tokens: Any,
    cache_rows: int | None,
    segment_ids: Any,
    weights: Any,
) -> None:
    """Raises ValueError unless tokens, cache, segment ids and weights belong to the same rows.

    Args:
        tokens: integers [batch, seq], neither empty.
        cache_rows: rows of the cache; None = no cache.
        segment_ids: integers [batch, seq] >= 0 or booleans; None = no boundary.
        weights: [batch, seq]; None = 1.
    """
    shape = np.shape(tokens)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"tokens must be [batch, seq] with at least one row and one token: got shape {shape}; "
            "pass tokens[None] for a single row, and skip empty calls"
        )
    if not jnp.issubdtype(_dtype(tokens), jnp.integer):
        raise ValueError(f"tokens must be integers: got {_dtype(tokens)}; pass token ids")
    if cache_rows is not None and cache_rows != shape[0]:
        raise ValueError(
            f"cache and tokens must have the same rows: got a cache of {cache_rows} and tokens of "
            f"shape {shape}; make the cache with init_cache({shape[0]}, max_len)"
        )
    for name, array in (("segment_ids", segment_ids), ("weights", weights)):
        if array is not None and np.shape(array) != shape:
            raise ValueError(
                f"{name} must have one number a token: got shape {np.shape(array)} for tokens of "
                f"shape {shape}; pass [batch, seq]"
            )
    if segment_ids is not None:
        _require_segment_ids(segment_ids)


def _require_segment_ids(segment_ids: Any) -> None:
    dtype = _dtype(segment_ids)
    if not (jnp.issubdtype(dtype, jnp.integer) or dtype == jnp.bool_):
        raise ValueError(f"segment_ids must be integers: got {dtype}; pass document numbers")
    is_known = not isinstance(segment_ids, Tracer)
    if is_known and getattr(segment_ids, "is_fully_addressable", True):
        least = int(np.min(np.asarray(segment_ids)))
        if least < 0:
            raise ValueError(
                f"segment_ids must not be negative: got {least}; number the documents from 0, and "
                "give padding a number of its own and weight 0"
            )


def _dtype(array: Any) -> np.dtype:
    return array.dtype if hasattr(array, "dtype") else np.asarray(array).dtype
