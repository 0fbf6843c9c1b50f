"""The definition: scores times a decay matrix, quadratic in the sequence. The oracle."""

import jax
import jax.numpy as jnp

from longctx_jax.ops.decay.powers import decay_power, document_index, initial_state
from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Bool, Float


def decay_attention_reference(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq #heads"] | None = None,
    scale: float,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`; all sums in float32, or float64 for float64 input.

    out_t = scale ( sum_{s<=t} M_ts (q_t.k_s) v_s + M_t,-1 S_0^T q_t ), M_ts = prod_{s<u<=t} decay_u
    and S_N = M_N-1,-1 S_0 + sum_s M_N-1,s k_s v_s^T; a reset cuts the products.

    Cost: 2 batch heads seq^2 (key + value) flops; seq^2 scores a head in memory.
    """
    dtype = accumulator(query, value)
    seq = query.shape[1]
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    state = initial_state(query, value, state)

    decay, read = _products(log_decay, seq)
    if reset is not None:
        document = jnp.moveaxis(document_index(reset), 1, 2)  # [batch, heads or 1, seq]
        is_same = document[..., :, None] == document[..., None, :]
        decay = jnp.where(is_same, decay, 0)
        read = jnp.where(document == 0, read, 0)
    write, forget = decay[..., -1, :], read[..., -1]

    scores = jnp.einsum("bthk,bshk->bhts", query, key) * decay
    out = jnp.einsum("bhts,bshv->bthv", scores, value)
    out += jnp.moveaxis(read, -1, -2)[..., None] * jnp.einsum("bthk,bhkv->bthv", query, state)
    written = jnp.moveaxis(write, -1, -2)[..., None] * key
    state = forget[..., None, None] * state + jnp.einsum("bshk,bshv->bhkv", written, value)
    return scale * out, state


def _products(log_decay: jax.Array, seq: int) -> tuple[jax.Array, jax.Array]:
    """Returns M [.., heads, seq, seq] and M_t,-1 [.., heads, seq]; leading axis 1 or batch."""
    time = jnp.arange(seq)
    if log_decay.ndim == 1:
        decay = decay_power(log_decay, time[:, None] - time[None, :])[None]
        return decay, decay_power(log_decay, time + 1)[None]
    logs = jnp.moveaxis(log_decay, 1, 2)
    is_after = time[:, None] > time[None, :]
    # Sums down each column, over u in (s, t]: no difference of large numbers is taken.
    total = jnp.cumsum(jnp.where(is_after, logs[..., :, None], 0.0), axis=-2)
    decay = jnp.where(time[:, None] >= time[None, :], jnp.exp(total), 0.0)
    return decay, jnp.exp(jnp.cumsum(logs, axis=-1))
