"""The chunkwise form (Lightning Attention-2, RetNet, SSD): quadratic in chunks, recurrent between.

For a chunk of c tokens with local index i and state S before it, a_i = lambda^(i+1) (read) and
b_i = lambda^(c-1-i) (write):

    O  = scale [ ((Q K^T) o M) V + a . (Q S) ],   M_ij = lambda^(i-j) for i >= j
    S' = lambda^c S + (b . K)^T V

All chunks compute their products at once; only the cheap recurrence over S is sequential.
"""

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.ops.decay.powers import accumulator, decay_power, document_index, initial_state
from longctx_jax.typing import Array, Bool, Float

CHUNK_LEN = 64  # tokens


def decay_attention_chunked(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq"] | None = None,
    scale: float,
    chunk_len: int = CHUNK_LEN,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`, for any seq (the last chunk may be short).

    Matrix-product inputs stay in the input dtype, sums and states in float32.

    Cost: 2 batch heads seq (chunk_len (key + value) + 2 key value) flops; memory
        seq (chunk_len + key value / chunk_len) a head; seq / chunk_len sequential steps.
    """
    dtype = accumulator(query, value)
    batch, seq, heads, _ = query.shape
    chunk = min(chunk_len, seq)
    n_chunks = -(-seq // chunk)

    def split(x):  # [batch, seq, ...] -> [batch, n_chunks, chunk, ...], zeros at the end
        pad = [(0, 0), (0, n_chunks * chunk - seq)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, pad).reshape(batch, n_chunks, chunk, *x.shape[2:])

    q, k, v = split(query), split(key), split(value)
    lengths = np.minimum(chunk, seq - chunk * np.arange(n_chunks))  # tokens in each chunk
    time = np.arange(chunk)
    decay = decay_power(log_decay, jnp.asarray(time[:, None] - time[None, :]))[None, None]
    read = decay_power(log_decay, jnp.asarray(time + 1))[None, None]  # [1, 1, heads, chunk]
    write = decay_power(log_decay, jnp.asarray(lengths[:, None] - 1 - time))  # [heads, n, chunk]
    write = jnp.moveaxis(write, 0, 1)[None]  # [1, n, heads, chunk]; 0 on padding
    forget = jnp.moveaxis(decay_power(log_decay, jnp.asarray(lengths)), 0, 1)[None]  # [1, n, heads]
    if reset is not None:
        document = document_index(split(reset))  # padding continues the last document
        is_first = document == 0
        decay = decay * (document[..., :, None] == document[..., None, :])[:, :, None]
        read = read * is_first[:, :, None]
        write = write * (document == document[..., -1:])[:, :, None]
        forget = forget * is_first[:, :, -1, None]

    def product(spec, *operands):
        return jnp.einsum(spec, *operands, preferred_element_type=dtype)

    scores = product("bnthk,bnshk->bnhts", q, k) * decay
    out = product("bnhts,bnshv->bnthv", scores.astype(v.dtype), v)
    k = (k * jnp.moveaxis(write, 2, 3)[..., None]).astype(key.dtype)
    added = product("bnshk,bnshv->bnhkv", k, v)
    state, before = _states_before_chunks(initial_state(query, value, state), added, forget)
    read = jnp.moveaxis(read, 2, 3)[..., None]
    out += read * product("bnthk,bnhkv->bnthv", q, before.astype(q.dtype))
    out = out.reshape(batch, n_chunks * chunk, heads, -1)[:, :seq]
    return (scale * out).astype(value.dtype), state


def _states_before_chunks(state, added, forget):
    """Runs S <- forget S + added over chunks; returns the last S and every S before its chunk."""
    if added.shape[1] == 1:  # the usual case in a short window: no loop
        return forget[:, 0, :, None, None] * state + added[:, 0], state[:, None]
    forget = jnp.broadcast_to(forget, added.shape[:3])

    def step(state, chunk):
        added, forget = chunk
        return forget[..., None, None] * state + added, state

    chunks = (jnp.moveaxis(added, 1, 0), jnp.moveaxis(forget, 1, 0))
    state, before = jax.lax.scan(step, state, chunks)
    return state, jnp.moveaxis(before, 0, 1)
