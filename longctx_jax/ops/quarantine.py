"""NaN and inf stay in their document: what keeps packed documents apart when one overflows.

A matrix product gives a masked token the weight 0, and 0 * NaN is NaN: in every form that
multiplies (all but the plain recurrences) one broken document would break its whole row. So, before
the algorithm runs, tokens with a number that is not finite are set to 0; afterwards everything
their document reads from then on is set to NaN, as it would have been. Selections only: values and
gradients of other documents are those of a row without the broken one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.typing import Array, Bool, PyTree

NO_TOKEN = -2  # before the state, which is at -1


class Poison(NamedTuple):
    """Where numbers are not finite, and who sees them."""

    is_bad: jax.Array  # bool [batch, seq], tokens
    is_state_bad: jax.Array  # bool [batch], what came before the call
    reached: jax.Array  # bool [batch, seq], tokens that follow a bad one in its document

    def clean(self, x: jax.Array) -> jax.Array:
        """Returns x [batch, seq, ...] with 0 for the bad tokens."""
        return jnp.where(_like(self.is_bad, x), jnp.zeros((), x.dtype), x)

    def clean_state(self, state: PyTree) -> PyTree:
        """Returns arrays [batch, ...] with 0 for the rows that are bad."""
        rows = self.is_state_bad
        return jax.tree.map(lambda x: jnp.where(_like(rows, x), jnp.zeros((), x.dtype), x), state)

    def spread(self, y: jax.Array) -> jax.Array:
        """Returns y [batch, seq, ...] with NaN where a bad token is seen."""
        return jnp.where(_like(self.reached, y), jnp.asarray(jnp.nan, y.dtype), y)

    def spread_state(self, state: PyTree) -> PyTree:
        """Returns arrays [batch, ...] of after the call, NaN where the last document is reached."""
        last = self.reached[:, -1]
        nan = jnp.nan
        return jax.tree.map(
            lambda x: jnp.where(_like(last, x), jnp.asarray(nan, x.dtype), x), state
        )


def is_bad(x: jax.Array, *, allow_minus_inf: bool = False) -> jax.Array:
    """Returns whether any number of a token is not finite, [batch, seq] of [batch, seq, ...].

    `allow_minus_inf`: log decays may be -inf, which forgets all.
    """
    bad = jnp.isnan(x) | (x == jnp.inf) if allow_minus_inf else ~jnp.isfinite(x)
    return jnp.any(bad, axis=tuple(range(2, x.ndim)))


def find_poison(
    bad: Bool[Array, "batch seq"], reset: Bool[Array, "batch seq"] | None, state: PyTree = None
) -> Poison:
    """Returns what bad tokens, or rows of a bad state, reach.

    Args:
        bad: tokens that are not finite.
        reset: True where a document starts; None = all tokens continue that of the state.
        state: of before the call, floating-point arrays [batch, ...].

    Cost: a few operations a token.
    """
    bad_rows = jnp.zeros(bad.shape[:1], bool)
    for leaf in jax.tree.leaves(state):
        bad_rows |= ~jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
    place = jnp.arange(bad.shape[1], dtype=jnp.int32)
    before = jnp.where(bad_rows, -1, NO_TOKEN)[:, None].astype(jnp.int32)
    latest = jnp.maximum(jax.lax.cummax(jnp.where(bad, place, NO_TOKEN), axis=1), before)
    start = jnp.int32(-1)
    if reset is not None:
        start = jax.lax.cummax(jnp.where(reset, place, -1), axis=1)
    return Poison(bad, bad_rows, latest >= start)


def _like(rows: jax.Array, x: jax.Array) -> jax.Array:
    return rows.reshape(*rows.shape, *[1] * (x.ndim - rows.ndim))
