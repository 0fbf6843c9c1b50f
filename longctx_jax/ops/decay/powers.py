"""Powers of the decay, and document resets as indices: what every algorithm here shares."""

import jax
import jax.numpy as jnp

from longctx_jax.typing import Array, Bool, Float, Int


def decay_power(
    log_decay: Float[Array, " heads"], distance: Int[Array, "*shape"]
) -> Float[Array, "heads *shape"]:
    """Returns exp(log_decay * distance) with 0^0 = 1, and 0 for negative distances.

    Exact at log_decay = 0 (no decay) and -inf (only the current token); its gradient is finite
    at both. The mask is applied before exp, so a negative distance can never overflow.
    """
    dtype = jnp.promote_types(log_decay.dtype, jnp.float32)
    log_decay = log_decay.astype(dtype).reshape(-1, *[1] * distance.ndim)
    steps = jnp.where(distance > 0, distance, 1).astype(dtype)
    power = jnp.exp(log_decay * steps)
    return jnp.where(distance > 0, power, (distance == 0).astype(dtype))


def document_index(reset: Bool[Array, "*batch seq"]) -> Int[Array, "*batch seq"]:
    """Returns how many resets happened up to and including each token."""
    return jnp.cumsum(reset.astype(jnp.int32), axis=-1)


def accumulator(*arrays: jax.Array):
    """Returns the dtype sums are kept in: float32, or float64 when handed float64."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def initial_state(query: jax.Array, value: jax.Array, state: jax.Array | None) -> jax.Array:
    """Returns `state` in the accumulator's dtype, zeros [batch, heads, key, value] if None."""
    dtype = accumulator(query, value)
    batch, _, heads, d_key = query.shape
    if state is None:
        return jnp.zeros((batch, heads, d_key, value.shape[-1]), dtype)
    return state.astype(dtype)
