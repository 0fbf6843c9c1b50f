"""Attention over some of the keys, and how results over disjoint key sets combine exactly.

Visibility is decided by positions and documents alone: query position i sees key position j iff

    0 <= j <= i,   i - j < window_len (if given),   segment_id(i) == segment_id(j).

A key position of -1 is an empty slot, so a ring buffer, a padded block and a fresh cache need no
other mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.position import DistanceBias, distance_bias
from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Float

NEVER = -1  # position of an empty key slot


class Partial(NamedTuple):
    """Attention over some of the keys: divided by its own normaliser, whose log is kept."""

    out: jax.Array  # [batch, seq, heads, value]
    log_normalizer: jax.Array  # [batch, seq, heads], nats; -inf where no key was visible


class Keys(NamedTuple):
    """Where queries and keys stand in their stream. Leading axes broadcast over the batch."""

    query_positions: jax.Array  # int32 [batch or 1, seq]
    key_positions: jax.Array  # int32 [batch or 1, keys]; NEVER = empty slot
    query_segment_ids: jax.Array | None = None  # int32, as query_positions
    key_segment_ids: jax.Array | None = None


def merge_partial_attention(left: Partial, right: Partial) -> Partial:
    """Combines two attention results computed over disjoint key sets.

    Associative, so any reduction order gives the same answer up to rounding. A row with no keys
    (log-normaliser -inf) is neutral; two of them give output 0 and log-normaliser -inf.

    Raises:
        ValueError: if the leading shapes differ.

    Cost: O(batch seq heads value); no matrix product.
    Source: Milakov & Gimelshein (2018), online normaliser for softmax.
    """
    if left.out.shape != right.out.shape:
        raise ValueError(
            f"partial results must have equal shapes: got {left.out.shape} and {right.out.shape}"
        )
    largest = jnp.maximum(left.log_normalizer, right.log_normalizer)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    left_mass = jnp.exp(left.log_normalizer - largest)
    right_mass = jnp.exp(right.log_normalizer - largest)
    mass = left_mass + right_mass
    safe_mass = jnp.where(mass > 0, mass, 1.0)
    out = (
        left.out * (left_mass / safe_mass)[..., None]
        + right.out * (right_mass / safe_mass)[..., None]
    )
    log_normalizer = jnp.where(mass > 0, largest + jnp.log(safe_mass), -jnp.inf)
    return Partial(out.astype(left.out.dtype), log_normalizer)


def attention_to_self(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq kv_heads key"],
    value: Float[Array, "batch seq kv_heads value"],
    *,
    relative_bias: DistanceBias | None = None,
    scale: float | None = None,
) -> Partial:
    """Returns each token's attention to itself alone: a softmax over one key.

    To be merged with what came before; arguments as of `attention_partial`. No matrix product.
    """
    group = query.shape[2] // key.shape[2]
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    wide = accumulator(query)
    scores = factor * jnp.sum(query.astype(wide) * key.astype(wide), axis=-1)
    if relative_bias is not None:
        scores += distance_bias(relative_bias, jnp.zeros((), jnp.int32)).reshape(1, 1, -1)
    return Partial(value, scores)


def empty_partial(like: Partial) -> Partial:
    """Returns the neutral element of `merge_partial_attention`."""
    return Partial(jnp.zeros_like(like.out), jnp.full_like(like.log_normalizer, -jnp.inf))


def is_visible(where: Keys, window_len: int) -> jax.Array:
    """Returns the visibility rule of this file as bool [batch or 1, seq, keys]."""
    distance = where.query_positions[:, :, None] - where.key_positions[:, None, :]
    visible = (distance >= 0) & (where.key_positions >= 0)[:, None, :]
    if window_len:
        visible &= distance < window_len
    if where.query_segment_ids is not None and where.key_segment_ids is not None:
        visible &= where.query_segment_ids[:, :, None] == where.key_segment_ids[:, None, :]
    return visible
