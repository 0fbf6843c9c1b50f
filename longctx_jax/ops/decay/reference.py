"""The definition: scores times a decay matrix, quadratic in the sequence. The oracle."""

import jax.numpy as jnp

from longctx_jax.ops.decay.powers import accumulator, decay_power, document_index, initial_state
from longctx_jax.typing import Array, Bool, Float


def decay_attention_reference(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq"] | None = None,
    scale: float,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`; all sums in float32, or float64 for float64 input.

    out_t = scale ( sum_{s<=t} lambda^(t-s) (q_t.k_s) v_s + lambda^(t+1) S_0^T q_t ), t from 0, and
    S_N = lambda^N S_0 + sum_s lambda^(N-1-s) k_s v_s^T; a reset cuts both sums.

    Cost: 2 batch heads seq^2 (key + value) flops; seq^2 scores a head in memory.
    """
    dtype = accumulator(query, value)
    seq = query.shape[1]
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    state = initial_state(query, value, state)

    time = jnp.arange(seq)
    decay = decay_power(log_decay, time[:, None] - time[None, :])[None]  # [1, heads, seq, seq]
    read = decay_power(log_decay, time + 1)[None]  # what is left of S_0 at each token
    write = decay_power(log_decay, seq - 1 - time)[None]  # what is left of each token at the end
    forget = decay_power(log_decay, jnp.asarray(seq))[None]  # [1, heads]
    if reset is not None:
        document = document_index(reset)
        decay = decay * (document[:, None, :, None] == document[:, None, None, :])
        read = read * (document == 0)[:, None]
        write = write * (document == document[:, -1:])[:, None]
        forget = forget * (document[:, -1:] == 0)

    scores = jnp.einsum("bthk,bshk->bhts", query, key) * decay
    out = jnp.einsum("bhts,bshv->bthv", scores, value)
    out += jnp.einsum("bthk,bhkv,bht->bthv", query, state, jnp.broadcast_to(read, scores.shape[:3]))
    state = forget[..., None, None] * state + jnp.einsum(
        "bhs,bshk,bshv->bhkv", jnp.broadcast_to(write, scores.shape[:3]), key, value
    )
    return scale * out, state
