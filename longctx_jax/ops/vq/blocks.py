"""Softmax attention of blocks of queries over [compressive cache | window], in plain JAX.

For a query i of block b, with the table (m, n) of what was filed before the block,

    s[z] = q_i . C_z + log n[z]              for every code of the table
    s[j] = q_i . k_j + B[i, i-j]             for every key j <= i of the window or the block
    out_i = (sum_z exp(s[z]) m[z] + sum_j exp(s[j]) v_j) / (sum_z exp(s[z]) + sum_j exp(s[j]))

The blocks are walked one after another, so only one block's scores exist; the backward pass
recomputes them from the log-normaliser. Its rules, which autodiff could not know:

    key j gets a gradient from query i iff i - j <= window_len (straight-through, localised);
    with grad_through_cache off, so does value j, and the table gets none;
    the codebook and the counts get none.

They depend on distances alone, so the gradient, like the value, is that of any other block length.

Source: Lingle (2023), arXiv 2309.16354, section 3; Milakov & Gimelshein (2018) for the normaliser.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.products import accumulator, product


class Blocks(NamedTuple):
    """The differentiable inputs: queries of whole blocks, keys of the window and the blocks."""

    query: jax.Array  # [blocks, batch, kv_heads, group, block, key]
    key: jax.Array  # [batch, kv_heads, before + blocks * block, key], quantised
    value: jax.Array  # [batch, kv_heads, before + blocks * block, value]
    bias: jax.Array | None  # [blocks, batch, kv_heads, group, block, distances]
    mean: jax.Array  # [blocks, batch, kv_heads, codes, value]


class Constants(NamedTuple):
    """What gets no gradient."""

    codebook: jax.Array  # [kv_heads, codes, key]
    count: jax.Array  # int32 [blocks, batch, kv_heads, codes]
    query_document: jax.Array  # int32 [blocks, batch, block]; negative = padding
    key_document: jax.Array  # int32 [batch, keys]; negative, and unlike any query's = empty
    table_document: jax.Array  # int32 [blocks, batch]


class Rules(NamedTuple):
    """Static choices.

    Attributes:
        window_len: distances up to which keys get gradients and, without the table, are seen.
        scale: of the products of queries and keys.
        use_table: attend to the table; without it, strictly to the window.
        grad_through_cache: values get gradients at any distance.
    """

    window_len: int
    scale: float
    use_table: bool
    grad_through_cache: bool


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_blocks(rules: Rules, blocks: Blocks, constants: Constants) -> jax.Array:
    """Returns attention of every query, [blocks, batch, kv_heads, group, block, value].

    Rows of padding are 0. The result has the dtype of value.

    Cost: 2 batch heads seq (codes + before + block) (key + value) flops, 2.5 times that backwards;
    memory beside inputs and output: one block's scores.
    """
    return _forward(rules, blocks, constants)[0]


def _forward(rules: Rules, blocks: Blocks, constants: Constants):
    dtype = accumulator(blocks.query, blocks.value)

    def one(_, inputs):
        b, query, bias, mean, *marks = inputs
        keys = _take_keys(blocks, constants, b, query.shape[-2])
        table, window = _scores(rules, query, bias, keys, constants.codebook, marks, dtype)
        largest = jnp.maximum(jnp.max(table, -1, initial=-jnp.inf), jnp.max(window, -1))
        largest = jnp.where(jnp.isfinite(largest), largest, 0.0)[..., None]
        table, window = jnp.exp(table - largest), jnp.exp(window - largest)
        total = jnp.sum(table, -1) + jnp.sum(window, -1)
        safe = jnp.where(total > 0, total, 1.0)
        weigh = functools.partial(product, "bhgts,bhsv->bhgtv", dtype=dtype)
        out = weigh(window.astype(keys.value.dtype), keys.value)
        if rules.use_table:
            out += weigh(table.astype(keys.value.dtype), mean.astype(keys.value.dtype))
        log_normalizer = jnp.where(total > 0, largest[..., 0] + jnp.log(safe), jnp.inf)
        return None, ((out / safe[..., None]).astype(blocks.value.dtype), log_normalizer)

    _, (out, log_normalizer) = jax.lax.scan(one, None, _per_block(blocks, constants))
    return out, log_normalizer


def _forward_rule(rules: Rules, blocks: Blocks, constants: Constants):
    out, log_normalizer = _forward(rules, blocks, constants)
    return out, (blocks, constants, out, log_normalizer)


def _backward_rule(rules: Rules, saved, d_out):
    blocks, constants, out, log_normalizer = saved
    dtype = accumulator(blocks.query, blocks.value)
    block = blocks.query.shape[-2]

    def one(totals, inputs):
        (b, query, bias, mean, *marks), out, log_normalizer, d_out = inputs
        keys = _take_keys(blocks, constants, b, block)
        table, window = _scores(rules, query, bias, keys, constants.codebook, marks, dtype)
        table = jnp.exp(table - log_normalizer[..., None])
        window = jnp.exp(window - log_normalizer[..., None])
        row = jnp.sum(d_out.astype(dtype) * out.astype(dtype), -1)[..., None]
        d_out = d_out.astype(keys.value.dtype)
        is_near = _distance(block, keys) <= rules.window_len

        weigh = functools.partial(product, dtype=dtype)
        d_window = window * (weigh("bhgtv,bhsv->bhgts", d_out, keys.value) - row)
        d_query = weigh("bhgts,bhsk->bhgtk", d_window.astype(query.dtype), keys.key)
        near = jnp.where(is_near, d_window, 0.0).astype(query.dtype)
        d_key = rules.scale * weigh("bhgts,bhgtk->bhsk", near, query)
        given = window if rules.grad_through_cache else jnp.where(is_near, window, 0.0)
        d_value = weigh("bhgts,bhgtv->bhsv", given.astype(d_out.dtype), d_out)
        d_mean = jnp.zeros(mean.shape, mean.dtype)
        if rules.use_table:
            d_table = weigh("bhgtv,bhsv->bhgts", d_out, mean.astype(d_out.dtype)) - row
            d_table = (table * d_table).astype(query.dtype)
            codebook = _for_batch(constants.codebook, query)
            d_query += weigh("bhgts,bhsk->bhgtk", d_table, codebook)
            if rules.grad_through_cache:
                d_mean = weigh("bhgts,bhgtv->bhsv", table.astype(d_out.dtype), d_out)
        d_bias = None if bias is None else _by_distance(d_window, bias.shape[-1]).astype(bias.dtype)
        totals = tuple(
            jax.lax.dynamic_update_slice_in_dim(
                total,
                jax.lax.dynamic_slice_in_dim(total, b * block, d.shape[2], 2) + d,
                b * block,
                2,
            )
            for total, d in zip(totals, (d_key, d_value), strict=True)
        )
        d_query = (rules.scale * d_query).astype(query.dtype)
        return totals, (d_query, d_bias, d_mean.astype(mean.dtype))

    zeros = (jnp.zeros(blocks.key.shape, dtype), jnp.zeros(blocks.value.shape, dtype))
    inputs = (_per_block(blocks, constants), out, log_normalizer, d_out)
    (d_key, d_value), (d_query, d_bias, d_mean) = jax.lax.scan(one, zeros, inputs)
    d_key, d_value = d_key.astype(blocks.key.dtype), d_value.astype(blocks.value.dtype)
    return Blocks(d_query, d_key, d_value, d_bias, d_mean), None


attend_blocks.defvjp(_forward_rule, _backward_rule)


class _Keys(NamedTuple):
    """Keys that one block sees one by one: those before it, then its own."""

    key: jax.Array
    value: jax.Array
    document: jax.Array


def _per_block(blocks: Blocks, constants: Constants):
    return (
        jnp.arange(blocks.query.shape[0]),
        blocks.query,
        blocks.bias,
        blocks.mean,
        constants.count,
        constants.query_document,
        constants.table_document,
    )


def _take_keys(blocks: Blocks, constants: Constants, b, block: int) -> _Keys:
    n_blocks = blocks.query.shape[0]
    n_keys = blocks.key.shape[2] - (n_blocks - 1) * block

    def take(x, axis):
        return jax.lax.dynamic_slice_in_dim(x, b * block, n_keys, axis)

    return _Keys(take(blocks.key, 2), take(blocks.value, 2), take(constants.key_document, 1))


def _distance(block: int, keys: _Keys) -> jax.Array:
    """Returns query position - key position, [block, keys]."""
    n_keys = keys.key.shape[2]
    return jnp.arange(block)[:, None] + (n_keys - block) - jnp.arange(n_keys)[None]


def _scores(rules: Rules, query, bias, keys: _Keys, codebook, marks, dtype):
    """Returns the masked scores of the table, with log counts, and of the window."""
    count, query_document, table_document = marks
    score = functools.partial(product, "bhgtk,bhsk->bhgts", dtype=dtype)
    distance = _distance(query.shape[-2], keys)
    visible = (distance >= 0)[None] & (query_document[:, :, None] == keys.document[:, None])
    if not rules.use_table:
        visible &= (distance <= rules.window_len)[None]
    window = rules.scale * score(query, keys.key)
    if bias is not None:
        window += _by_key(bias.astype(dtype), keys.key.shape[2])
    window = jnp.where(visible[:, None, None], window, -jnp.inf)
    if not rules.use_table:
        return jnp.zeros((*window.shape[:-1], 0), dtype), window
    log_count = jnp.log(count.astype(dtype))[:, :, None, None]  # -inf for an empty code
    table = rules.scale * score(query, _for_batch(codebook, query)) + log_count
    visible = query_document == table_document[:, None]
    return jnp.where(visible[:, None, None, :, None], table, -jnp.inf), window


def _for_batch(codebook, query):
    shape = (query.shape[0], *codebook.shape)
    return jnp.broadcast_to(codebook.astype(query.dtype), shape)


def _by_key(bias: jax.Array, n_keys: int) -> jax.Array:
    """Turns [..., block, distance] into [..., block, key], 0 where the distance is not listed.

    Row t is moved right by t, which a reshape does: in rows that are one longer than wide, the
    start of row t lies t places further on (Dai et al. 2019, appendix B).
    """
    block, n_distances = bias.shape[-2:]
    n_before = max(n_keys - block, n_distances - 1)  # keys before the block, real or not
    width = n_before + block
    left = n_before - (n_distances - 1)
    padding = [(0, 0)] * (bias.ndim - 1) + [(left, width + 1 - left - n_distances)]
    flat = jnp.pad(bias[..., ::-1], padding).reshape(*bias.shape[:-2], -1)
    return flat[..., : block * width].reshape(*bias.shape[:-1], width)[..., width - n_keys :]


def _by_distance(scores: jax.Array, n_distances: int) -> jax.Array:
    """The transpose of `_by_key`: [..., block, key] to [..., block, distance]."""
    block, n_keys = scores.shape[-2:]
    n_before = max(n_keys - block, n_distances - 1)
    width = n_before + block
    left = n_before - (n_distances - 1)
    padding = [(0, 0)] * (scores.ndim - 1) + [(width - n_keys, 0)]
    flat = jnp.pad(scores, padding).reshape(*scores.shape[:-2], -1)
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, block)])
    rows = flat.reshape(*scores.shape[:-1], width + 1)
    return rows[..., left : left + n_distances][..., ::-1]
