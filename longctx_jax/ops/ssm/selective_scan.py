"""The selective scan of Mamba-1, by tokens and by chunks.

    h_t = e^{delta_t a} h_{t-1} + (delta_t u_t) b_t^T,   y_t = h_t c_t + d u_t    h: [model, state]

Decays are below 1 and only ever multiplied, so nothing overflows. The chunked form takes prefix
products of (decay, input) pairs in a chunk, the serial one its tokens in turn; both recompute the
chunk in the backward pass: tensors [seq, model, state] exist for one chunk at a time.

Source: Gu & Dao (2023), arXiv 2312.00752.
"""

import functools

import jax
import jax.numpy as jnp

from longctx_jax.ops.checked import checked
from longctx_jax.ops.dispatch import Implementation
from longctx_jax.ops.products import accumulator
from longctx_jax.ops.quarantine import find_poison, is_bad
from longctx_jax.ops.recurrence import (
    Facts,
    choose_form,
    is_one_step,
    join_time,
    require_chunk_len,
    split_time,
    time_first,
)
from longctx_jax.typing import Array, Bool, Float

CHUNK_LEN = 64  # tokens


@checked
def selective_scan(
    u: Float[Array, "batch seq model"],
    delta: Float[Array, "batch seq model"],
    a: Float[Array, "model state"],
    b: Float[Array, "batch seq state"],
    c: Float[Array, "batch seq state"],
    d: Float[Array, " model"] | None = None,
    state: Float[Array, "batch model state"] | None = None,
    *,
    reset: Bool[Array, "batch seq"] | None = None,
    implementation: str = "auto",
    chunk_len: int = CHUNK_LEN,
) -> tuple[Float[Array, "batch seq model"], Float[Array, "batch model state"]]:
    """Returns y and the state h after the last token.

    Args:
        u: input of each channel.
        delta: step sizes > 0.
        a: rates < 0, log of what a state keeps per unit step.
        b: input weights, shared by the channels.
        c: output weights, shared by the channels.
        d: weight of the input itself; None = 0.
        state: h before the first token; None = zeros.
        reset: True where a token starts a new document: what came before is forgotten.
        implementation: "auto", "recurrent", "serial" or "chunked"; all give the same result.
        chunk_len: tokens a chunk.

    Returns:
        y in the dtype of u; h in float32, or float64 for float64 input.

    Raises:
        ValueError: unknown implementation, chunk_len < 1, or no token.

    Cost: 1 exponential and 6 flops a token, channel and state; the chunked form about twice the
    flops, in seq / chunk_len walks of log2(chunk_len) steps.
    """
    require_chunk_len("selective_scan", chunk_len)
    run = choose_form("selective_scan", FORMS, implementation, u.shape[1])
    dtype, u_dtype = accumulator(u, delta, b, c), u.dtype
    if state is None:
        state = jnp.zeros((u.shape[0], *a.shape), dtype)
    wide = [x.astype(dtype) for x in (u, delta, a, b, c, state)]
    poison = None
    if reset is not None:
        poison = find_poison(is_bad(u) | is_bad(delta) | is_bad(b) | is_bad(c), reset, state)
        u, delta, a, b, c, state = wide
        u, delta, b, c = (poison.clean(x) for x in (u, delta, b, c))
        wide = [u, delta, a, b, c, poison.clean_state(state)]
    y, last = run(*wide, reset, chunk_len)
    if d is not None:
        y += d.astype(dtype)[None, None] * wide[0]
    y = y.astype(u_dtype)
    return (y, last) if poison is None else (poison.spread(y), poison.spread_state(last))


def _recurrent(u, delta, a, b, c, state, reset, chunk_len):
    """The definition: a scan over tokens."""
    del chunk_len
    tokens = [time_first(x) for x in (u, delta, b, c)]
    resets = None if reset is None else time_first(reset)
    state, y = jax.lax.scan(functools.partial(_step, a), state, (*tokens, resets))
    return time_first(y), state


def _serial(u, delta, a, b, c, state, reset, chunk_len):
    """The definition, recomputed chunk by chunk in the backward pass."""

    def chunk(state, tokens):
        return jax.lax.scan(functools.partial(_step, a), state, tokens)

    return _walk(chunk, u, delta, b, c, state, reset, chunk_len)


def _chunked(u, delta, a, b, c, state, reset, chunk_len):
    """Prefix products within a chunk, a scan over chunks that carries h."""

    def merge(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def chunk(state, tokens):
        u, delta, b, c, reset = tokens
        decay, entering = _coefficients(u, delta, a, b, reset)
        entering = entering.at[0].add(decay[0] * state)
        _, states = jax.lax.associative_scan(merge, (decay, entering))
        return states[-1], jnp.einsum("tbdn,tbn->tbd", states, c)

    return _walk(chunk, u, delta, b, c, state, reset, chunk_len)


def _walk(chunk, u, delta, b, c, state, reset, chunk_len):
    """Returns (y, state) of a scan over chunks that recomputes them in the backward pass."""
    seq = u.shape[1]
    chunk_len = min(chunk_len, seq)
    # Padding has delta = 0: it keeps the state and adds nothing.
    tokens = [split_time(x, chunk_len) for x in (u, delta, b, c)]
    resets = None if reset is None else split_time(reset, chunk_len)
    state, y = jax.lax.scan(jax.checkpoint(chunk), state, (*tokens, resets))
    return join_time(y, seq), state


def _step(a, state, token):
    """Returns the state after a token, and y [batch, model]."""
    u, delta, b, c, reset = token
    decay, entering = _coefficients(u, delta, a, b, reset)
    state = decay * state + entering
    return state, jnp.einsum("bdn,bn->bd", state, c)


def _coefficients(u, delta, a, b, reset) -> tuple[jax.Array, jax.Array]:
    """Returns what a token keeps of the state and what it adds, both [..., model, state]."""
    rates = a.reshape(*[1] * (delta.ndim - 1), *a.shape)
    decay = jnp.exp(delta[..., None] * rates)
    if reset is not None:
        decay = jnp.where(reset[..., None, None], 0, decay)
    return decay, (delta * u)[..., None] * b[..., None, :]


def _is_not_cpu(facts: Facts) -> str:
    """On a CPU short steps cost little; elsewhere each one is a kernel launch or more."""
    return "" if facts.platform == "cpu" else "a step for each token"


FORMS = (
    Implementation("serial", _serial, unattractive=lambda f: is_one_step(f) or _is_not_cpu(f)),
    Implementation("chunked", _chunked, unattractive=is_one_step),
    Implementation("recurrent", _recurrent),
)
