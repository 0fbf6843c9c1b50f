"""A call cut into segments and what is left of it; the split law makes every such cut exact."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.typing import PyTree

# (pieces [n, batch, length, ...], state, number of the first) -> (outputs [n, batch, length, d],
# state, sums)
Run = Callable[[PyTree, Any, int], tuple[jax.Array, Any, PyTree]]


def cut(tree: PyTree, n: int, length: int) -> PyTree:
    """Returns the first n pieces of leaves [batch, seq, ...] as [n, batch, length, ...]."""

    def one(leaf):
        leaf = leaf[:, : n * length]
        return jnp.moveaxis(leaf.reshape(leaf.shape[0], n, length, *leaf.shape[2:]), 1, 0)

    return jax.tree.map(one, tree)


def join(pieces: jax.Array) -> jax.Array:
    """Returns pieces [n, batch, length, d] behind each other, [batch, n * length, d]."""
    joined = jnp.moveaxis(pieces, 0, 1)
    return joined.reshape(joined.shape[0], -1, joined.shape[-1])


def after(tree: PyTree, start: int) -> PyTree:
    """Returns the tokens from `start` on, of leaves [batch, seq, ...]."""
    return jax.tree.map(lambda leaf: leaf[:, start:], tree)


def run_in_segments(
    run: Run, stream: PyTree, state: Any, segment_len: int
) -> tuple[jax.Array, Any, PyTree]:
    """Runs whole segments, then the shorter last one where the call does not end with a segment.

    Args:
        run: goes through pieces of one length.
        stream: leaves [batch, seq, ...].
        state: goes from piece to piece.
        segment_len: tokens a segment; longer than the call = the call.

    Returns:
        (outputs [batch, seq, d], the last state, sums over all pieces).
    """
    seq = jax.tree.leaves(stream)[0].shape[1]
    segment_len = min(segment_len, seq)
    n_whole = seq // segment_len
    pieces, state, sums = run(cut(stream, n_whole, segment_len), state, 0)
    y = join(pieces)
    if tail_len := seq - n_whole * segment_len:
        tail = cut(after(stream, seq - tail_len), 1, tail_len)
        last, state, more = run(tail, state, n_whole)
        y = jnp.concatenate([y, join(last)], axis=1)
        sums = jax.tree.map(jnp.add, sums, more)
    return y, state, sums
