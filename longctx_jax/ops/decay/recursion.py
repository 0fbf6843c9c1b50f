"""The recursion: halve the sequence; what the second half sees of the first has low rank.

    O over [a, b) = ( O over [a, m),  O over [m, b) + (read . Q) S ),   S = (write . K)^T V, [a, m)

Down to tiles of LEAF_LEN tokens, computed directly. Decays are measured from the midpoint m, so all
are powers with positive distance. O(seq log seq) work: an independent check and a baseline.

Source: LeetDecoding (Wang et al. 2025, arXiv 2501.02573).
"""

import functools

import jax
import jax.numpy as jnp

from longctx_jax.ops import products
from longctx_jax.ops.decay.chunks import chunk_factors, end_factors, make_pieces
from longctx_jax.ops.decay.powers import initial_state
from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Bool, Float

LEAF_LEN = 32  # tokens


def decay_attention_recursion(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq #heads"] | None = None,
    scale: float,
    chunk_len: int = LEAF_LEN,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`; chunk_len is the leaf.

    The halves of all nodes of one depth are computed together. Padded to a power of two of leaves.

    Cost: 2 batch heads seq (chunk_len (key + value) + key value log2(seq / chunk_len)) flops.
    """
    dtype = accumulator(query, value)
    seq = query.shape[1]
    leaf = min(chunk_len, seq)
    n_leaves = 1 << (-(-seq // leaf) - 1).bit_length()
    padding = n_leaves * leaf - seq

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))

    q, k, v = pad(query), pad(key), pad(value)
    reset = None if reset is None else pad(reset)
    per_token = pad(log_decay) if log_decay.ndim == 3 else log_decay

    product = functools.partial(products.product, dtype=dtype)

    def nodes(x, length):  # [batch, padded, ...] -> [batch, nodes, length, ...]
        return x.reshape(x.shape[0], -1, length, *x.shape[2:])

    def pieces_of(length):
        return make_pieces(per_token, reset, n_leaves * leaf, length)

    def scaled(x, factor):  # factor [batch or 1, nodes, heads, length]
        return (x * jnp.swapaxes(factor, -1, -2)[..., None]).astype(x.dtype)

    def broadcast(factor, length):
        shape = (1, n_leaves * leaf // length, q.shape[2], length)
        return jnp.broadcast_to(factor, jnp.broadcast_shapes(factor.shape, shape))

    within = chunk_factors(log_decay, pieces_of(leaf), leaf).decay
    scores = product("bnthk,bnshk->bnhts", nodes(q, leaf), nodes(k, leaf)) * within
    out = product("bnhts,bnshv->bnthv", scores.astype(v.dtype), nodes(v, leaf))
    out = out.reshape(*v.shape[:2], *out.shape[3:])

    half = leaf
    while half < n_leaves * leaf:
        read, write, _ = end_factors(log_decay, pieces_of(half), half)
        read, write = broadcast(read, half)[:, 1::2], broadcast(write, half)[:, 0::2]
        left = product(
            "bnshk,bnshv->bnhkv", scaled(nodes(k, half)[:, 0::2], write), nodes(v, half)[:, 0::2]
        )
        seen = product("bnthk,bnhkv->bnthv", nodes(q, half)[:, 1::2], left.astype(q.dtype))
        seen = seen * jnp.swapaxes(read, -1, -2)[..., None]
        both = jnp.stack([jnp.zeros_like(seen), seen], axis=2)
        out = out + both.reshape(out.shape)
        half *= 2

    start = initial_state(query, value, state)
    whole = make_pieces(log_decay, None if reset is None else reset[:, :seq], seq, seq)
    whole = jax.tree.map(lambda x: x[0] if x.ndim == 1 else x[:, 0], whole)
    read, write, forget = end_factors(log_decay, whole, seq)
    read, write = (jnp.swapaxes(factor, -1, -2)[..., None] for factor in (read, write))
    out = out[:, :seq] + read * product("bthk,bhkv->bthv", query, start.astype(query.dtype))
    written = (key * write).astype(key.dtype)
    added = product("bshk,bshv->bhkv", written, value)
    return scale * out, forget[..., None, None] * start + added
