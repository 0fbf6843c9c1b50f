"""The exponentially weighted average of RWKV-4, in one form by tokens and one by chunks.

    out_t = ( e^{o-q} a + e^{u+k_t-q} v_t ) / ( e^{o-q} b + e^{u+k_t-q} )     q  = max(o, u + k_t)
    a <- e^{o+w-q'} a + e^{k_t-q'} v_t,  b <- e^{o+w-q'} b + e^{k_t-q'},  o <- q' = max(o + w, k_t)

State (a, b, o) stands for the sums e^o a and e^o b: every exponent is <= 0, so nothing overflows
for any key. States of neighbouring runs of tokens merge in the same way, which is what the chunked
form uses; it takes the same maxima and hence ends in the same state.

Source: Peng et al. (2023), arXiv 2305.13048, appendix on numerical stability.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.checked import checked
from longctx_jax.ops.dispatch import Implementation
from longctx_jax.ops.products import accumulator
from longctx_jax.ops.quarantine import find_poison, is_bad
from longctx_jax.ops.recurrence import (
    choose_form,
    is_one_step,
    join_time,
    require_chunk_len,
    split_time,
    time_first,
)
from longctx_jax.typing import Array, Bool, DType, Float

CHUNK_LEN = 32  # tokens
NEVER = -1e38  # log of the weight of nothing; finite, so that differences are


class WKV4State(NamedTuple):
    """Weighted sums of values and of ones, divided by exp(log_scale); float32 [batch, model]."""

    numerator: jax.Array
    denominator: jax.Array
    log_scale: jax.Array


def init_wkv4_state(batch_size: int, d_model: int, dtype: DType = jnp.float32) -> WKV4State:
    """Returns the state before any token: three buffers, which may be donated."""
    shape = (batch_size, d_model)
    zeros = (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    return WKV4State(*zeros, jnp.full(shape, NEVER, dtype))


@checked
def wkv4(
    key: Float[Array, "batch seq model"],
    value: Float[Array, "batch seq model"],
    decay_rate: Float[Array, " model"],
    bonus: Float[Array, " model"],
    state: WKV4State | None = None,
    *,
    reset: Bool[Array, "batch seq"] | None = None,
    implementation: str = "auto",
    chunk_len: int = CHUNK_LEN,
) -> tuple[Float[Array, "batch seq model"], WKV4State]:
    """Returns the average of all values so far, weighted by key and age, and the state after them.

    Args:
        key: log of a token's weight.
        value: what is averaged.
        decay_rate: w < 0, log of what a weight keeps per token.
        bonus: u, added to the key of the current token.
        state: of the tokens before; None = none.
        reset: True where a token starts a new document: what came before is forgotten.
        implementation: "auto", "recurrent" or "chunked"; all give the same result.
        chunk_len: tokens a chunk.

    Returns:
        out in the dtype of value; the state in float32, or float64 for float64 input. Gradients
        flow through e^log_scale times the sums: log_scale alone is a constant of the state.

    Raises:
        ValueError: unknown implementation, chunk_len < 1, or no token.

    Cost: 4 exponentials and about 10 products a token and channel, in seq steps one after another;
    the chunked form does half as much again in 2 chunk_len + seq / chunk_len steps.
    """
    require_chunk_len("wkv4", chunk_len)
    run = choose_form("wkv4", FORMS, implementation, key.shape[1])
    dtype = accumulator(key, value)
    if state is None:
        state = init_wkv4_state(key.shape[0], key.shape[2], dtype)
    wide = (x.astype(dtype) for x in (key, value, decay_rate, bonus))
    before = WKV4State(*(x.astype(dtype) for x in state))
    if reset is None:
        out, last = run(*wide, before, reset, chunk_len)
        return out.astype(value.dtype), last
    poison = find_poison(is_bad(key) | is_bad(value), reset, before)
    wide_key, wide_value, *weights = wide
    tokens = (poison.clean(wide_key), poison.clean(wide_value))
    out, last = run(*tokens, *weights, poison.clean_state(before), reset, chunk_len)
    return poison.spread(out.astype(value.dtype)), WKV4State(*poison.spread_state(tuple(last)))


def _recurrent(key, value, decay_rate, bonus, state, reset, chunk_len):
    """The definition: a scan over tokens."""
    del chunk_len
    tokens = [time_first(x) for x in (key, value)]
    resets = None if reset is None else time_first(reset)

    def step(state, token):
        key, value, reset = token
        if reset is not None:
            empty = init_wkv4_state(key.shape[0], key.shape[1], key.dtype)
            pairs = zip(empty, state, strict=True)
            state = WKV4State(*(jnp.where(reset[:, None], e, s) for e, s in pairs))
        return _write(state, key, value, decay_rate), _read(state, key, value, bonus)

    state, out = jax.lax.scan(step, state, (*tokens, resets))
    return time_first(out), state


def _chunked(key, value, decay_rate, bonus, state, reset, chunk_len):
    """All chunks side by side: what each adds, then what each starts from, then the averages."""
    seq = key.shape[1]
    chunk_len = min(chunk_len, seq)
    log_decay = jnp.broadcast_to(decay_rate, (1, seq, decay_rate.shape[0]))
    if reset is not None:
        log_decay = jnp.where(reset[..., None], NEVER, log_decay)
    # Padding adds nothing and keeps everything: its key is NEVER, its decay 0.
    tokens = (split_time(key, chunk_len, NEVER), split_time(value, chunk_len))
    tokens = (*tokens, split_time(log_decay, chunk_len))
    tokens = tuple(time_first(x) for x in tokens)  # [chunk_len, n_chunks, batch, model]

    nothing = init_wkv4_state(key.shape[0], key.shape[2], key.dtype)
    n_chunks = tokens[0].shape[1]
    empty = WKV4State(*(jnp.broadcast_to(x, (n_chunks, *x.shape)) for x in nothing))
    added, _ = jax.lax.scan(lambda state, token: (_write(state, *token), None), empty, tokens)

    def follow(state, chunk):
        return _merge(state, *chunk), state

    state, starts = jax.lax.scan(follow, state, (jnp.sum(tokens[2], axis=0), added))

    def step(state, token):
        key, value, log_decay = token
        old = state
        if reset is not None:  # of the current token's decay only a reset matters to its average
            old = state._replace(log_scale=jnp.where(log_decay == NEVER, NEVER, state.log_scale))
        return _write(state, *token), _read(old, key, value, bonus)

    _, out = jax.lax.scan(step, starts, tokens)
    return join_time(time_first(out), seq), state


def _read(state: WKV4State, key: jax.Array, value: jax.Array, bonus: jax.Array) -> jax.Array:
    """Returns the average over the state and the current token."""
    # The result does not depend on the scale: neither need its gradient.
    now = bonus.reshape(*[1] * (key.ndim - 1), -1) + key
    scale = jax.lax.stop_gradient(jnp.maximum(state.log_scale, now))
    past, now = jnp.exp(state.log_scale - scale), jnp.exp(now - scale)
    return (past * state.numerator + now * value) / (past * state.denominator + now)


def _write(state: WKV4State, key: jax.Array, value: jax.Array, log_decay: jax.Array) -> WKV4State:
    """Returns the state after a token that keeps exp(log_decay) of it."""
    return _merge(state, log_decay, WKV4State(value, jnp.ones_like(value), key))


def _merge(early: WKV4State, log_decay: jax.Array, late: WKV4State) -> WKV4State:
    """Returns the sum of a state that then decays and the state of what came meanwhile."""
    if log_decay.ndim == 1:  # the same for all rows
        log_decay = log_decay.reshape(*[1] * (early.log_scale.ndim - 1), -1)
    kept = early.log_scale + log_decay
    scale = jax.lax.stop_gradient(jnp.maximum(kept, late.log_scale))
    old, new = jnp.exp(kept - scale), jnp.exp(late.log_scale - scale)
    return WKV4State(
        old * early.numerator + new * late.numerator,
        old * early.denominator + new * late.denominator,
        scale,
    )


FORMS = (
    Implementation("chunked", _chunked, unattractive=is_one_step),
    Implementation("recurrent", _recurrent),
)
