"""Read from and write to an associative memory (A, z): a mini-batch delta rule.

With features f >= 0 of a query or a key, and eps = 1e-5 as published,

    read    y_i   = (f_i A) / (f_i . z + eps)
    write   vbar_i = (f_i A) / (f_i . z + eps)                             what the key recalls now
            gamma_i = stop_gradient(clip(1 - (f_i . z + eps) / (|f_i|^2 + eps), 0, 1))
            A' = A + sum_i beta_i f_i (v_i - vbar_i)^T
            z' = z + sum_i gamma_i f_i

All rows of one write see the same old (A, z). Into an empty memory vbar is 0 and gamma is 1: the
formula's 1 - eps / (|f|^2 + eps) would be off by as much as 3e-3 for small keys. Everything is
computed in float32, whatever the dtype of the inputs, and without TF32 on accelerators.

Source: Rodkin et al. (2024), arXiv 2407.04841, and its public code, which adds both eps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.checked import checked
from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Bool, Float

EPS = 1e-5


class MemoryState(NamedTuple):
    """An associative memory; leading axes are any, e.g. batch and heads."""

    matrix: jax.Array  # float32 [*batch, features, value]
    normalizer: jax.Array  # float32 [*batch, features]


class Written(NamedTuple):
    """The memory after a write, and gamma [*batch, tokens] in [0, 1] of each row written."""

    state: MemoryState
    gamma: jax.Array


def init_memory_state(
    batch: tuple[int, ...], n_features: int, d_value: int, dtype=jnp.float32
) -> MemoryState:
    """Returns an empty memory: 4 features (value + 1) bytes for each of the leading axes."""
    return MemoryState(
        jnp.zeros((*batch, n_features, d_value), dtype), jnp.zeros((*batch, n_features), dtype)
    )


@checked
def associative_read(
    features: Float[Array, "*batch tokens features"],
    state: MemoryState,
    *,
    use_denominator: bool = True,
    eps: float = EPS,
) -> Float[Array, "*batch tokens value"]:
    """Returns what each query recalls, in the dtype of features; 0 from an empty memory.

    Args:
        features: of the queries, as `dpfp` makes them.
        use_denominator: divide by f . z + eps; without it y = f A.
        eps: as above. Where gamma was clipped to 0, A was written and z was not, so a query may
            meet f . z near 0 and be divided by eps: a larger one bounds what it recalls.

    Raises:
        ValueError: if the state is not one of these features.

    Cost: 2 batch tokens features (value + 1) flops.
    """
    _require_state("associative_read", features, state)
    return _recall(features, state, use_denominator, eps)[0].astype(features.dtype)


@checked
def associative_write(
    features: Float[Array, "*batch tokens features"],
    value: Float[Array, "*batch tokens value"],
    beta: Float[Array, "*batch tokens"],
    state: MemoryState,
    *,
    is_empty: Bool[Array, "*batch"] | None = None,
    correction: bool = True,
    use_denominator: bool = True,
    eps: float = EPS,
) -> Written:
    """Returns the memory after writing all tokens at once.

    Args:
        features: of the keys.
        value: what the keys should recall.
        beta: how much of it to write, in (0, 1); it gates the matrix, not the normalizer.
        state: the memory before.
        is_empty: where nothing counts that was written before: the state is replaced by zeros and
            the rule for an empty memory holds. None = nowhere.
        correction: gamma as above; without it gamma = 1.
        use_denominator: without it, the normalizer is left alone and vbar = f A.
        eps: as of `associative_read`.

    Raises:
        ValueError: if the state is not one of these features.

    Cost: 4 batch tokens features value flops.
    """
    _require_state("associative_write", features, state)
    if is_empty is None:
        is_empty = jnp.zeros(features.shape[:-2], bool)
    state = MemoryState(
        jnp.where(is_empty[..., None, None], 0, state.matrix),
        jnp.where(is_empty[..., None], 0, state.normalizer),
    )
    recalled, denominator = _recall(features, state, use_denominator, eps)
    dtype = recalled.dtype
    features = features.astype(dtype)
    gamma = jnp.ones(features.shape[:-1], dtype)
    if correction and use_denominator:
        squared = jnp.sum(features**2, axis=-1)
        gamma = jnp.clip(1 - denominator / (squared + eps), 0, 1)
        gamma = jax.lax.stop_gradient(jnp.where(is_empty[..., None], 1, gamma))
    change = beta.astype(dtype)[..., None] * (value.astype(dtype) - recalled)
    matrix = state.matrix + _einsum("...tf,...tv->...fv", features, change)
    normalizer = state.normalizer
    if use_denominator:
        normalizer = normalizer + _einsum("...tf,...t->...f", features, gamma)
    return Written(MemoryState(matrix, normalizer), gamma)


def _recall(features, state: MemoryState, use_denominator: bool, eps: float):
    dtype = accumulator(features, state.matrix)
    features = features.astype(dtype)
    recalled = _einsum("...tf,...fv->...tv", features, state.matrix.astype(dtype))
    normalizer = state.normalizer.astype(dtype)
    denominator = _einsum("...tf,...f->...t", features, normalizer) + eps
    if use_denominator:
        recalled = recalled / denominator[..., None]
    return recalled, denominator


def _einsum(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    # Never TF32: the memory is ill-conditioned where keys overlap.
    return jnp.einsum(spec, left, right, precision="highest")


def _require_state(name: str, features: jax.Array, state: MemoryState) -> None:
    wanted = (*features.shape[:-2], features.shape[-1])
    if state.normalizer.shape != wanted or state.matrix.shape[:-1] != wanted:
        raise ValueError(
            f"{name}: the state must have leading axes and features {wanted}: got matrix "
            f"{state.matrix.shape} and normalizer {state.normalizer.shape}; make it with "
            "init_memory_state of the same sizes"
        )
