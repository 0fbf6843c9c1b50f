"""The token recurrence: one decode step, and its scan over a sequence."""

import math

import jax
import jax.numpy as jnp

from longctx_jax.ops.decay.powers import decay_power, initial_state
from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Bool, Float


def step(
    query: Float[Array, "batch heads key"],
    key: Float[Array, "batch heads key"],
    value: Float[Array, "batch heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch heads"],
    state: Float[Array, "batch heads key value"],
    *,
    reset: Bool[Array, "batch #heads"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "batch heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention_step`, in plain JAX.

    Cost: 6 batch heads key value flops; reads and writes the state once.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    dtype = accumulator(query, value)
    if log_decay.ndim == 1:
        decay = decay_power(log_decay, jnp.asarray(1))[None]  # [1, heads]
    else:
        decay = jnp.exp(log_decay.astype(jnp.promote_types(log_decay.dtype, jnp.float32)))
    if reset is not None:
        decay = jnp.where(reset, 0, decay)
    update = key.astype(dtype)[..., None] * value.astype(dtype)[..., None, :]
    state = decay[..., None, None] * state.astype(dtype) + update
    out = scale * jnp.einsum("bhk,bhkv->bhv", query.astype(dtype), state)
    return out.astype(value.dtype), state


def decay_attention_recurrent(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq #heads"] | None = None,
    scale: float,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`, one token after another.

    Cost: 6 batch heads key value flops a token, seq sequential steps. Reverse-mode keeps every
    state (seq key value a head): use it for decoding and as an independent check.
    """
    is_per_token = log_decay.ndim == 3
    inputs = (query, key, value, log_decay if is_per_token else None, reset)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)

    def advance(state, token):
        q, k, v, g, r = token
        g = g if is_per_token else log_decay
        out, state = step(q, k, v, g, state, reset=r, scale=scale)
        return state, out

    state, out = jax.lax.scan(advance, initial_state(query, value, state), tokens)
    return jnp.moveaxis(out, 0, 1), state
