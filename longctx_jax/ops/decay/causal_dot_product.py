"""The causal dot product: the token recurrence with a backward pass that keeps no states.

The kernel of fast-transformers (Katharopoulos et al. 2020, arXiv 2006.16236) with decay: the state
is updated and read token by token, and every gradient is such a walk too (`linear_vjp.py`).
"""

import jax
import jax.numpy as jnp

from longctx_jax.ops.decay.linear_vjp import differentiable
from longctx_jax.ops.decay.powers import initial_state
from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Bool, Float


def decay_attention_causal_dot_product(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq #heads"] | None = None,
    scale: float,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`.

    Cost: 6 batch heads key value flops a token, three times that backwards; seq sequential steps;
    memory of the backward pass: the inputs alone.
    """
    return _run(query, key, value, log_decay, state, reset, scale)


def _walk_tokens(
    x, y, z, log_decay, state, *, reset, scale, is_backwards: bool, out_dtype
) -> tuple[jax.Array, jax.Array]:
    dtype = accumulator(x, z)
    keep = jnp.exp(jnp.broadcast_to(log_decay, (*x.shape[:2], log_decay.shape[-1])))
    if reset is not None:
        keep = jnp.where(reset, 0.0, keep)

    def advance(state, token):
        x, y, z, keep = (a.astype(dtype) for a in token)
        added = y[..., :, None] * z[..., None, :]
        if is_backwards:  # the decay between this token and the one before comes after the read
            state = state + scale * added
            out = jnp.einsum("bhk,bhkv->bhv", x, state)
            return keep[..., None, None] * state, out.astype(out_dtype)
        state = keep[..., None, None] * state + added
        out = scale * jnp.einsum("bhk,bhkv->bhv", x, state)
        return state, out.astype(out_dtype)

    tokens = tuple(jnp.moveaxis(a, 1, 0) for a in (x, y, z, keep))
    start = initial_state(x, z, state)
    state, out = jax.lax.scan(advance, start, tokens, reverse=is_backwards)
    return jnp.moveaxis(out, 0, 1), state


_run = differentiable(_walk_tokens)
