"""Gradients of decay attention by the operator itself: one forward algorithm is the whole backward.

Write f(x, y, z) = sum_j M_ij (x_i . y_j) z_j, over j <= i, and f' for the same sum over j >= i with
M transposed, which walks from the last token to the first. Then

    O  = scale f(q, k, v)      dQ = scale f(dO, v, k)
    dK = scale f'(v, dO, q)    dV = scale f'(k, q, dO)

where dQ starts from S_0^T, dK and dV from the gradient of the last state, and the state that comes
out of dV's walk is the gradient of S_0. No state is kept: memory is that of the inputs.

The gradient of the decay has such a form too, a sum over later tokens of q . dq - k . dk. It is not
used: the two terms cancel, and what differs in the rounding of dq and dk adds up over the sequence
(in bfloat16 20 to 90 % of the gradient of a constant decay at 2,048 tokens). Where the decay is
differentiated its gradient comes from autodiff of the two-pass form, piece by piece: one more
forward and backward pass in plain JAX, whose products are local to a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from longctx_jax.ops.decay.powers import initial_state
from longctx_jax.ops.decay.two_pass import decay_attention_two_pass
from longctx_jax.ops.products import accumulator

PIECE_LEN = 4096  # tokens: the decay's gradient keeps one state a piece, and scores of one piece

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
    wants_decay: tuple | None  # () where the decay is differentiated: structure, no array


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
        return (out, last), _Kept(*values, wants_decay=() if log_decay.perturbed else None)

    def backward(scale, kept: _Kept, cotangents):
        d_out, d_last = (_or_none(c) for c in cotangents)
        query, key, value, log_decay, state, reset, wants_decay = kept
        if d_out is None:
            d_out = jnp.zeros(cotangents[0].aval.shape, value.dtype)
        d_out = d_out.astype(value.dtype)
        options = {"reset": reset, "scale": scale}
        n_heads, wide = d_out.shape[2], accumulator(query, value)

        def dtype_of(x):  # sums over a group are exact
            return x.dtype if x.shape[2] == n_heads else wide

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
            out_dtype=dtype_of(value),
            **options,
        )
        d_log_decay = jnp.zeros_like(log_decay)
        if wants_decay is not None:
            if d_last is None:
                d_last = jnp.zeros(cotangents[1].aval.shape, wide)
            d_log_decay = _decay_gradient(kept, scale, (d_out, d_last))
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


def _decay_gradient(kept: _Kept, scale: float, cotangents) -> jax.Array:
    """Returns the gradient of log_decay, by autodiff in pieces of PIECE_LEN tokens."""
    n_heads, seq = kept.log_decay.shape[-1], kept.query.shape[1]
    q, k, v = (share_heads(x, n_heads) for x in (kept.query, kept.key, kept.value))
    is_per_token = kept.log_decay.ndim == 3
    n_pieces = max(0, seq - 1) // PIECE_LEN  # the last piece, perhaps a short one, comes by itself

    def run(log_decay):
        tokens = (q, k, v, log_decay if is_per_token else None, kept.reset)

        @jax.checkpoint
        def advance(state, piece):
            q, k, v, g, reset = piece
            g = g if is_per_token else log_decay
            out, state = decay_attention_two_pass(q, k, v, g, state, reset=reset, scale=scale)
            return state, out

        def split(x):
            x = x[:, : n_pieces * PIECE_LEN]
            return jnp.moveaxis(x.reshape(x.shape[0], n_pieces, PIECE_LEN, *x.shape[2:]), 1, 0)

        state = initial_state(q, v, kept.state)
        rest = jax.tree.map(lambda x: x[:, n_pieces * PIECE_LEN :], tokens)
        if n_pieces == 0:  # a loop of no step is refused without compilation
            state, last = advance(state, rest)
            return last, state
        state, outs = jax.lax.scan(advance, state, jax.tree.map(split, tokens))
        state, last = advance(state, rest)
        outs = jnp.moveaxis(outs, 0, 1).reshape(last.shape[0], -1, *last.shape[2:])
        return jnp.concatenate([outs, last], axis=1), state

    _, pull = jax.vjp(run, kept.log_decay)
    return pull(cotangents)[0]


def _sum_groups(gradient: jax.Array, x: jax.Array) -> jax.Array:
    batch, seq, heads, width = x.shape
    grouped = gradient.reshape(batch, seq, heads, -1, width)
    return jnp.sum(grouped, axis=3).astype(x.dtype)


def _transposed(state: jax.Array | None) -> jax.Array | None:
    return None if state is None else jnp.swapaxes(state, -1, -2)


def _or_none(cotangent: Any) -> Any:
    return None if isinstance(cotangent, SymbolicZero) else cotangent
