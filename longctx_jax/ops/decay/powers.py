"""Powers of the decay, and document resets as indices: what every algorithm here shares.

With g_t the log decay of token t and G_t = g_0 + ... + g_t, what token s left is worth
exp(G_t - G_s) at token t. Only differences with s <= t are ever formed, and masked before exp, so
nothing overflows; an underflow to 0 is the right answer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Bool, Float, Int

# A decay of exp(-80) = 2e-35 or less per token forgets everything: it is treated as a reset, which
# is exact to float32 and keeps -inf out of sums.
FORGETS_ALL = -80.0
GRID = 16.0  # parts of a nat, see `log_sums`


class LogSums(NamedTuple):
    """G_t as coarse + fine, where coarse is a multiple of 1 / GRID and hence exact in float32."""

    coarse: jax.Array
    fine: jax.Array

    def __sub__(self, other: "LogSums") -> jax.Array:
        """Returns G_t - G_s to the last bits of the difference, however large both are."""
        return (self.coarse - other.coarse) + (self.fine - other.fine)

    def at(self, *index) -> "LogSums":
        """Returns both parts indexed."""
        return LogSums(self.coarse[index], self.fine[index])


def log_sums(log_decay: Float[Array, "*batch seq"]) -> LogSums:
    """Returns G along the last axis, float32 or wider.

    A plain float32 sum would lose digits of every later difference once strong decays have added up
    (|G| = 1000 leaves 1e-4); rounding each g to a grid first makes the large part of the sum exact.
    """
    coarse = jnp.round(log_decay * GRID) / GRID
    fine = log_decay - coarse
    return LogSums(jnp.cumsum(coarse, axis=-1), jnp.cumsum(fine, axis=-1))


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
    power = jnp.exp(log_decay * steps[None])
    is_past, is_now = (distance > 0)[None], (distance == 0)[None]
    return jnp.where(is_past, power, is_now.astype(dtype))


def separate_resets(
    log_decay: Float[Array, "*shape"], reset: Bool[Array, "batch seq _"] | None
) -> tuple[Float[Array, "*shape"], Bool[Array, "batch seq _"] | None]:
    """Returns per-token log decays free of -inf, and resets that include what was taken out.

    Decays of one constant a head stay as they are: products with a distance need no sum.
    """
    log_decay = log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32))
    if log_decay.ndim == 1:
        return log_decay, reset
    forgets = log_decay < FORGETS_ALL
    reset = forgets if reset is None else reset | forgets
    return jnp.where(forgets, 0.0, log_decay), reset


def document_index(reset: Bool[Array, "batch seq heads"]) -> Int[Array, "batch seq heads"]:
    """Returns how many resets happened up to and including each token."""
    return jnp.cumsum(reset.astype(jnp.int32), axis=1)


def initial_state(query: jax.Array, value: jax.Array, state: jax.Array | None) -> jax.Array:
    """Returns `state` in the accumulator's dtype, zeros [batch, heads, key, value] if None."""
    dtype = accumulator(query, value)
    batch, _, heads, d_key = query.shape
    if state is None:
        return jnp.zeros((batch, heads, d_key, value.shape[-1]), dtype)
    return state.astype(dtype)
