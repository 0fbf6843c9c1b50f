"""The token recurrence: one decode step, and its scan over a sequence."""

import math

import jax
import jax.numpy as jnp

from longctx_jax.ops.decay.powers import accumulator, decay_power, initial_state
from longctx_jax.typing import Array, Bool, Float


def decay_attention_step(
    query: Float[Array, "batch heads key"],
    key: Float[Array, "batch heads key"],
    value: Float[Array, "batch heads value"],
    log_decay: Float[Array, " heads"],
    state: Float[Array, "batch heads key value"],
    *,
    reset: Bool[Array, " batch"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "batch heads value"], Float[Array, "batch heads key value"]]:
    """Advances one token: S <- lambda S + k v^T, out = scale S^T q.

    Args:
        query: of one token, [batch, heads, key].
        key: as query.
        value: [batch, heads, value].
        log_decay: as in `decay_attention`.
        state: S after the token before, float32 (float64 for float64 input).
        reset: rows whose token starts a new document; their S is cleared first.
        scale: None = 1/sqrt(key width).

    Returns:
        out in the dtype of value, and the new state.

    Cost: 6 batch heads key value flops; reads and writes the state once.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    dtype = accumulator(query, value)
    decay = decay_power(log_decay, jnp.asarray(1))[None]  # [1, heads]
    if reset is not None:
        decay = decay * jnp.logical_not(reset)[:, None]
    update = key.astype(dtype)[..., None] * value.astype(dtype)[..., None, :]
    state = decay[..., None, None] * state.astype(dtype) + update
    out = scale * jnp.einsum("bhk,bhkv->bhv", query.astype(dtype), state)
    return out.astype(value.dtype), state


def decay_attention_recurrent(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq"] | None = None,
    scale: float,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`, one token after another.

    Cost: 6 batch heads key value flops a token, seq sequential steps. Reverse-mode keeps every
    state (seq key value a head): use it for decoding and as an independent check.
    """
    batch, seq = query.shape[:2]
    if reset is None:
        reset = jnp.zeros((batch, seq), bool)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (query, key, value, reset))

    def step(state, token):
        q, k, v, r = token
        out, state = decay_attention_step(q, k, v, log_decay, state, reset=r, scale=scale)
        return state, out

    state, out = jax.lax.scan(step, initial_state(query, value, state), tokens)
    return jnp.moveaxis(out, 0, 1), state
