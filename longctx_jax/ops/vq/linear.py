"""Vector-quantised attention in linear time: cut into blocks, file what leaves the window, attend.

A block of queries sees one by one the tokens since window_len before its start, and through the
table everything older. Each key is thus seen exactly once, so the result is that of the quadratic
definition whatever the block length, and a block may start anywhere in the stream: calls chain at
any split. One block that is as long as the call is the quadratic form.

Source: Lingle (2023), arXiv 2309.16354, section 3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.ops.vq.blocks import Blocks, Constants, Rules, attend_blocks
from longctx_jax.ops.vq.state import Tokens, VQState, chronological, join, write
from longctx_jax.ops.vq.table import PADDING, Table, file_tokens, tables_before_blocks
from longctx_jax.typing import Array, Float


def attend(
    query: Float[Array, "batch seq heads key"],
    tokens: Tokens,
    codebook: Float[Array, "kv_heads codes key"],
    state: VQState,
    *,
    is_fresh: bool,
    relative_bias: Float[Array, "batch seq heads distances"] | None,
    rules: Rules,
    block_len: int,
    sum_tables: Callable[..., Table] = tables_before_blocks,
    attend_blocks: Callable[[Rules, Blocks, Constants], Any] = attend_blocks,
) -> tuple[Float[Array, "batch seq heads value"], VQState]:
    """Returns attention of the tokens over the state and themselves, and the state after them.

    Args:
        query: of the tokens.
        tokens: quantised, heads before time; documents continue the state's.
        codebook: what the codes stand for.
        state: what came before.
        is_fresh: promise that the state is empty.
        relative_bias: of distances 0, 1, ...: at most window_len + 1 of them.
        rules: scale, window and gradients.
        block_len: queries a block.
        sum_tables: what sums the tables before blocks, by default one block after another.
        attend_blocks: what attends, by default plain JAX.
    """
    seq, window = query.shape[1], rules.window_len
    block = min(block_len, seq)
    n_blocks = -(-seq // block)
    # Blocks are filed whole, so the window before a block is rounded up to blocks; the added slots
    # are empty before the first block and hold tokens not yet filed before the others.
    before = _round_up(window, block) if n_blocks > 1 else window
    if is_fresh:  # no more than there can be
        before = min(before, (n_blocks - 1) * block)
    padding = n_blocks * block - seq
    if is_fresh:
        stream = tokens.pad(before, padding)
    else:
        stream = join(chronological(state), tokens).pad(before - window, padding)

    filed = stream.at(0, (n_blocks - 1) * block)
    table = state.table
    value = filed.value
    if not rules.grad_through_cache:
        value, table = jax.lax.stop_gradient((value, table))
    if n_blocks > 1 and rules.use_table:
        cut = _cut(filed.codes, 2, block), _cut(value, 2, block), _cut(filed.documents, 1, block)
        tables = sum_tables(table, *cut)
    else:  # nothing is filed between blocks
        tables = jax.tree.map(lambda x: jnp.broadcast_to(x, (n_blocks, *x.shape)), table)

    documents = jnp.pad(tokens.documents, [(0, 0), (0, padding)], constant_values=PADDING)
    constants = Constants(
        jax.lax.stop_gradient(codebook),
        tables.count,
        _cut(documents, 1, block),
        stream.documents,
        tables.document,
    )
    group = query.shape[2] // tokens.key.shape[1]
    bias = relative_bias
    if bias is not None:
        bias = _cut_queries(bias[..., : before + block], n_blocks, block, group)
    blocks = Blocks(
        _cut_queries(query, n_blocks, block, group), stream.key, stream.value, bias, tables.mean
    )
    out = attend_blocks(rules, blocks, constants)
    out = jnp.moveaxis(out, (0, 1, 2, 3, 4), (1, 0, 3, 4, 2))  # [batch, blocks, block, kv, group]
    out = out.reshape(query.shape[0], n_blocks * block, query.shape[2], -1)[:, :seq]
    last = jax.tree.map(lambda x: x[-1], tables)
    return out, _next_state(state, tokens, last, stream, n_blocks, block, before, rules)


def _next_state(
    state: VQState,
    tokens: Tokens,
    table: Table,
    stream: Tokens,
    n_blocks: int,
    block: int,
    before: int,
    rules: Rules,
) -> VQState:
    """Files all but the last window_len tokens and puts the others into the ring."""
    seq, window = tokens.documents.shape[1], rules.window_len
    if rules.use_table:
        leaving = stream.at((n_blocks - 1) * block, max(before + seq - window, 0))
        if leaving.documents.shape[1]:
            value = leaving.value
            if not rules.grad_through_cache:
                value = jax.lax.stop_gradient(value)
            table = file_tokens(table, leaving.codes, value, leaving.documents)
    kept = min(seq, window)
    return write(state, tokens.at(seq - kept, seq), table, seq)


def _round_up(length: int, unit: int) -> int:
    return -(-length // unit) * unit


def _cut(x: jax.Array, axis: int, block: int) -> jax.Array:
    """[..., n block, ...] -> [n, ..., block, ...]."""
    n_blocks = x.shape[axis] // block
    shape = (*x.shape[:axis], n_blocks, block, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _cut_queries(x: jax.Array, n_blocks: int, block: int, group: int) -> jax.Array:
    """[batch, seq, heads, width] -> [blocks, batch, kv_heads, group, block, width]."""
    batch, seq, heads, width = x.shape
    x = jnp.pad(x, [(0, 0), (0, n_blocks * block - seq), (0, 0), (0, 0)])
    x = x.reshape(batch, n_blocks, block, heads // group, group, width)
    return jnp.transpose(x, (1, 0, 3, 4, 2, 5))
