"""FleetAttention: a sum over rank components of (multiply, decayed prefix sum, multiply).

The score matrix is a sum of rank-one matrices, Q K^T = sum_r q_:r k_:r^T, and the mask turns each
into a two-sided scaling of itself:

    O = sum_r diag(q_:r) M (k_:r . V),    (M x)_t = decay_t (M x)_{t-1} + x_t

No product of matrices, nothing quadratic, no loop over tokens. The published form computes M x in
logarithms, which is not a number for signed x and loses digits with the length; here M x is an
associative scan on pairs (decay, x), where decays only multiply.

Source: LeetDecoding (Wang et al. 2025, arXiv 2501.02573).
"""

import jax
import jax.numpy as jnp

from longctx_jax.ops.decay.powers import initial_state
from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Bool, Float


def decay_attention_fleet(
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

    Cost: about 8 batch heads seq key value flops, none on matrix units; key passes over value-sized
    arrays, each of depth 2 log2(seq); memory of one pass, in the backward pass of key of them.
    """
    dtype = accumulator(query, value)
    keep = jnp.exp(jnp.broadcast_to(log_decay, query.shape[:3]))[..., None]
    if reset is not None:
        keep = jnp.where(reset[..., None], 0.0, keep)
    value = value.astype(dtype)

    def compose(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    @jax.checkpoint
    def component(total, row):
        q, k, start = row  # [batch, seq, heads] twice, S_0's row [batch, heads, value]
        x = k.astype(dtype)[..., None] * value
        x = x.at[:, 0].add(keep[:, 0] * start)
        _, sums = jax.lax.associative_scan(compose, (keep, x), axis=1)
        return total + q.astype(dtype)[..., None] * sums, sums[:, -1]

    state = initial_state(query, value, state)
    rows = (jnp.moveaxis(query, 3, 0), jnp.moveaxis(key, 3, 0), jnp.moveaxis(state, 2, 0))
    total, last = jax.lax.scan(component, jnp.zeros_like(value), rows)
    return scale * total, jnp.moveaxis(last, 0, 2)
