"""The two-pass, chunk-parallel form: every state between chunks first, then all chunks at once.

Pass 1 walks the states S' = f S + (b . K)^T V and keeps each; pass 2 computes
O = scale [ ((Q K^T) o M) V + a . (Q S) ] of all chunks in parallel. Only the cheap recurrence over
S is sequential. This is how GPU libraries split the work (state passing of SSD, Dao & Gu 2024,
arXiv 2405.21060); `prefix.py` does pass 1 by a parallel prefix, `quadratic.py` has one chunk.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from longctx_jax.ops import products
from longctx_jax.ops.decay.chunks import chunk_factors, join, make_pieces, split
from longctx_jax.ops.decay.powers import initial_state
from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Bool, Float

CHUNK_LEN = 64  # tokens

# (S before all [b,h,k,v], added [b,n,h,k,v], forget [b,n,h]) -> (last S, S before each chunk)
PassStates = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def decay_attention_two_pass(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq #heads"] | None = None,
    scale: float,
    chunk_len: int = CHUNK_LEN,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`, for any seq (the last chunk may be short).

    Matrix-product inputs stay in the input dtype, sums and states in float32.

    Cost: 2 batch heads seq (chunk_len (key + value) + 2 key value) flops; memory
        seq (chunk_len + key value / chunk_len) a head; seq / chunk_len sequential steps.
    """
    arrays = (query, key, value, log_decay, state)
    options = {"reset": reset, "scale": scale, "chunk_len": chunk_len}
    return chunk_parallel(*arrays, **options, pass_states=_walk)


def chunk_parallel(
    query, key, value, log_decay, state, *, reset, scale, chunk_len, pass_states: PassStates
):
    """Returns (out, state): all chunks at once, the states between them by `pass_states`."""
    dtype = accumulator(query, value)
    seq = query.shape[1]
    chunk = min(chunk_len, seq)
    q, k, v = (split(x, chunk) for x in (query, key, value))
    pieces = make_pieces(log_decay, reset, seq, chunk)
    factors = chunk_factors(log_decay, pieces, chunk)

    product = functools.partial(products.product, dtype=dtype)

    def per_token(factor):  # [..., heads, chunk] -> [..., chunk, heads, 1]
        return jnp.swapaxes(factor, -1, -2)[..., None]

    scores = product("bnthk,bnshk->bnhts", q, k) * factors.decay
    out = product("bnhts,bnshv->bnthv", scores.astype(v.dtype), v)
    k = (k * per_token(factors.write)).astype(key.dtype)
    added = product("bnshk,bnshv->bnhkv", k, v)
    forget = jnp.broadcast_to(factors.forget, added.shape[:3])
    state, before = pass_states(initial_state(query, value, state), added, forget)
    out += per_token(factors.read) * product("bnthk,bnhkv->bnthv", q, before.astype(q.dtype))
    return join((scale * out).astype(value.dtype), seq), state


def _walk(state, added, forget):
    """Runs S <- forget S + added over chunks, one after another."""
    if added.shape[1] == 1:  # the usual case in a short window: no loop
        return forget[:, 0, :, None, None] * state + added[:, 0], state[:, None]

    def advance(state, chunk):
        added, forget = chunk
        return forget[..., None, None] * state + added, state

    chunks = (jnp.moveaxis(added, 1, 0), jnp.moveaxis(forget, 1, 0))
    state, before = jax.lax.scan(advance, state, chunks)
    return state, jnp.moveaxis(before, 0, 1)
