"""Gradients of decay attention by the operator itself: one forward algorithm is the whole backward.

Write f(x, y, z) = sum_j M_ij (x_i . y_j) z_j, over j <= i, and f' for the same sum over j >= i with
M transposed, which walks from the last token to the first. Then

    O  = scale f(q, k, v)      dQ = scale f(dO, v, k)
    dK = scale f'(v, dO, q)    dV = scale f'(k, q, dO)

where dQ starts from S_0^T, dK and dV from the gradient of the last state, and the state that comes
out of dV's walk is the gradient of S_0. For the decay, with d_t = q_t . dq_t - k_t . dk_t,

    d log decay_t = sum_{u >= t} d_u + <dS_N, S_N>

in float32, since the difference cancels. Memory is that of the inputs: no state is kept.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from longctx_jax.ops.decay.powers import accumulator

# f(x, y, z, log_decay, state, *, reset, scale, is_backwards, out_dtype) -> (out, last state).
# Forwards `scale` multiplies the output; backwards it multiplies the scores and what enters the
# state, because the state handed in is already a gradient.
Walk = Callable[..., tuple[jax.Array, jax.Array]]


class _Kept(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array
    log_decay: jax.Array
    state: jax.Array | None
    reset: jax.Array | None
    last: jax.Array | None  # the last state; None where no decay gradient is wanted


def differentiable(walk: Walk) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns (query, key, value, log_decay, state, reset, scale) -> (out, state) with gradients.

    Query, key and value may have fewer heads than the state, each a divisor: the walk shares them,
    and their gradients are summed over the group.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
    def run(query, key, value, log_decay, state, reset, scale):
        return walk(
            query,
            key,
            value,
            log_decay,
            state,
            reset=reset,
            scale=scale,
            is_backwards=False,
            out_dtype=value.dtype,
        )

    def forward(query, key, value, log_decay, state, reset, scale):
        arrays = (query, key, value, log_decay, state, reset)
        values: list[Any] = [None if a is None else a.value for a in arrays]
        out, last = run_untyped(*values, scale)
        return (out, last), _Kept(*values, last=last if log_decay.perturbed else None)

    def backward(scale, kept: _Kept, cotangents):
        d_out, d_last = (_or_none(c) for c in cotangents)
        query, key, value, log_decay, state, reset, last = kept
        if d_out is None:
            d_out = jnp.zeros(cotangents[0].aval.shape, value.dtype)
        d_out = d_out.astype(value.dtype)
        options = {"reset": reset, "scale": scale}
        n_heads, wide = d_out.shape[2], accumulator(query, value)

        def dtype_of(x):  # exact products for the decay, exact sums over a group
            return x.dtype if last is None and x.shape[2] == n_heads else wide

        d_query, _ = walk(
            d_out,
            value,
            key,
            log_decay,
            _transposed(state),
            is_backwards=False,
            out_dtype=dtype_of(query),
            **options,
        )
        d_key, _ = walk(
            value,
            d_out,
            query,
            log_decay,
            _transposed(d_last),
            is_backwards=True,
            out_dtype=dtype_of(key),
            **options,
        )
        d_value, d_state = walk(
            key,
            query,
            d_out,
            log_decay,
            d_last,
            is_backwards=True,
            out_dtype=value.dtype if value.shape[2] == n_heads else wide,
            **options,
        )
        d_log_decay = jnp.zeros_like(log_decay)
        if last is not None:
            d_log_decay = _decay_gradient(query, key, d_query, d_key, log_decay, last, d_last)
        return (
            _sum_groups(d_query, query),
            _sum_groups(d_key, key),
            _sum_groups(d_value, value),
            d_log_decay,
            None if state is None else d_state.astype(state.dtype),
            None,
        )

    run.defvjp(forward, backward, symbolic_zeros=True)
    run_untyped: Any = run
    return run_untyped


def share_heads(x: jax.Array, n_heads: int) -> jax.Array:
    """Returns [batch, seq, n_heads, width]: each head of x serves a run of neighbours."""
    group = n_heads // x.shape[2]
    return x if group == 1 else jnp.repeat(x, group, axis=2)


def _decay_gradient(query, key, d_query, d_key, log_decay, last, d_last):
    def dots(x, d):  # in the wider of the two dtypes
        return jnp.sum(share_heads(x, d.shape[2]).astype(d.dtype) * d, axis=-1)

    difference = dots(query, d_query) - dots(key, d_key)  # [batch, seq, heads]
    end = 0.0 if d_last is None else jnp.sum(d_last * last, axis=(-1, -2))[:, None]
    per_token = jnp.flip(jnp.cumsum(jnp.flip(difference, 1), 1), 1) + end
    if log_decay.ndim == 3:
        return per_token.astype(log_decay.dtype)
    total = jnp.sum(per_token, axis=(0, 1)).astype(log_decay.dtype)
    return jnp.where(jnp.isneginf(log_decay), 0.0, total)  # exp(-inf) does not move


def _sum_groups(gradient: jax.Array, x: jax.Array) -> jax.Array:
    batch, seq, heads, width = x.shape
    grouped = gradient.reshape(batch, seq, heads, -1, width)
    return jnp.sum(grouped, axis=3).astype(x.dtype)


def _transposed(state: jax.Array | None) -> jax.Array | None:
    return None if state is None else jnp.swapaxes(state, -1, -2)


def _or_none(cotangent: Any) -> Any:
    return None if isinstance(cotangent, SymbolicZero) else cotangent
