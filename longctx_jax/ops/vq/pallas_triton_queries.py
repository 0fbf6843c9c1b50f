"""Triton kernels that own a tile of queries: the attention itself, and the queries' gradient.

Forwards a program owns a tile of queries and of value columns. It walks the tiles of codes, then
those of the keys from its block's first one to its own last row, with the online softmax

    m' = max(m, max s),   l <- l exp2(m - m') + sum exp2(s - m'),   o likewise,

and ends with out = o / l and the log-normaliser m + log2 l. Values wider than a tile are split over
programs, each of which computes the scores again. Backwards a program owns all columns: it sums
dO V^T over tiles of them, and

    dS = P (dO V^T - sum dO O),   dq = scale (sum dS k + sum dS C),   dB at (row, distance) = dS.

Source: Dao et al. (2022), arXiv 2205.14135; Lingle (2023), arXiv 2309.16354, section 3.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from longctx_jax.ops.triton_kernels import quietly
from longctx_jax.ops.vq.pallas_triton_tiles import (
    Setup,
    any_of,
    bias_place,
    code_scores,
    dot_over_values,
    key_range,
    key_scores,
    load,
    load_key_documents,
    specs,
    store,
    take_rows,
)

LOWEST = -1e30  # below any score, and finite: a row that sees nothing divides by nothing


def forward(
    arrays: dict[str, jax.Array], setup: Setup, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns (out, log_normalizer): [blocks, batch, kv_heads, group, block(, value)].

    Args:
        arrays: by name, padded, without the table's where rules.use_table is off.
        setup: of the kernel.
        interpret: run in the interpreter, anywhere.

    Cost: with c columns seen by a row (codes + before + block/2 about) and t tiles of value
    columns, 2 c (t key + value) flops a query; c (key + value) items read from the second-level
    cache a tile of queries; from memory each array about once, + the bias; value + 4 bytes a query
    written.
    """
    query, value = arrays["query"], arrays["value"]
    out_shape = {
        "out": jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), value.dtype),
        "log_normalizer": jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32),
    }
    out = _call(_forward_kernel, "vq_attention_forward", arrays, out_shape, setup, interpret)
    return out["out"], out["log_normalizer"]


def query_gradient(
    arrays: dict[str, jax.Array], d_bias_dtype: Any, setup: Setup, *, interpret: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Returns (d_query, d_bias or None).

    Args:
        arrays: as in `forward`, with out (its gradient), log_normalizer and row_term.
        d_bias_dtype: of the bias's gradient.
        setup: of the kernel.
        interpret: run in the interpreter, anywhere.

    Cost: 2 c (2 key + value) flops a query (c as in `forward`); reads c (key + value) items a tile
    of queries and the tile's output gradients once a tile of columns, both from the second-level
    cache; the gradient of the bias is zeroed and written once.
    """
    query, bias = arrays["query"], arrays.get("bias")
    out_shape = {"query": jax.ShapeDtypeStruct(query.shape, query.dtype)}
    start = {}
    if bias is not None:  # distances at which no key stood stay zero
        out_shape["bias"] = jax.ShapeDtypeStruct(bias.shape, d_bias_dtype)
        start["bias"] = jnp.zeros(bias.shape, d_bias_dtype)
    name = "vq_attention_query_gradient"
    out = _call(_gradient_kernel, name, arrays, out_shape, setup, interpret, start)
    return out["query"], out.get("bias")


def _call(kernel, name, arrays, out_shape, setup: Setup, interpret, start=None):
    """Runs a kernel over (tiles of queries, value tiles, heads); `start` becomes outputs."""
    sizes, start = setup.sizes, start or {}
    heads = sizes.kv_heads * sizes.group

    def place(step, tile, row):
        del tile
        head = row % heads
        at = {"b": row // heads, "h": head // sizes.group, "g": head % sizes.group}
        return {"n": step // setup.row_tiles, **at}

    value_tiles = setup.value_tiles if "out" in out_shape else 1
    run = pl.pallas_call(
        functools.partial(kernel, names=tuple(arrays), setup=setup),
        grid=(sizes.n_blocks * setup.row_tiles, value_tiles, sizes.batch * heads),
        in_specs=specs(arrays, place) + specs(start, place),
        out_specs=specs(out_shape, place),
        out_shape=list(out_shape.values()),
        input_output_aliases={
            len(arrays) + i: list(out_shape).index(name) for i, name in enumerate(start)
        },
        compiler_params=plt.CompilerParams(
            num_warps=setup.tiles.n_warps, num_stages=setup.tiles.n_stages
        ),
        interpret=interpret,
        name=name,
    )
    return dict(zip(out_shape, quietly(run, *arrays.values(), *start.values()), strict=True))


def _walk(ref, rows, query, visit, carry, setup: Setup):
    """Folds visit(carry, score, key, values, index) over the tiles of codes, then of keys.

    values(columns) loads the tile's values; index is the first key's, None for codes.
    """
    tiles = setup.tiles
    if setup.rules.use_table:
        sees = any_of(rows.document == ref["table_document"][0])
        n_tiles = sees.astype(jnp.int32) * setup.code_tiles

        def visit_codes(i, carry):
            start = i * tiles.columns
            word = load(ref["codebook"], (), start, tiles.columns, setup.code_limit, slice(None))
            score = code_scores(ref, (), rows, query, start, word, setup)

            def values(columns):
                return load(ref["mean"], (), start, tiles.columns, setup.code_limit, columns)

            return visit(carry, score, word, values, None)

        carry = jax.lax.fori_loop(0, n_tiles, visit_codes, carry)
    first, n_tiles = key_range(ref, rows, setup)

    def visit_keys(i, carry):
        start = first + i * tiles.columns
        key = load(ref["key"], (), start, tiles.columns, setup.key_limit, slice(None))
        document = load_key_documents(ref, start, setup)
        score, _ = key_scores(ref, rows, query, start, key, document, setup)

        def values(columns):
            return load(ref["value"], (), start, tiles.columns, setup.key_limit, columns)

        return visit(carry, score, key, values, start)

    return jax.lax.fori_loop(0, n_tiles, visit_keys, carry)


def _forward_kernel(*refs, names, setup: Setup):
    ref, (out_ref, normalizer_ref) = dict(zip(names, refs, strict=False)), refs[-2:]
    tiles = setup.tiles
    tile = pl.program_id(1)
    columns = pl.ds(tile * tiles.value, tiles.value)
    rows = take_rows(ref, (), (), pl.program_id(0), setup)
    query = load(ref["query"], (), rows.start, tiles.rows, setup.row_limit, slice(None))

    def visit(carry, score, key, values, index):
        del key, index
        largest, total, out = carry
        new = jnp.maximum(largest, jnp.max(score, axis=1))
        shrink = jnp.exp2(largest - new)
        weight = jnp.exp2(score - new[:, None])
        value = values(columns)
        total = total * shrink + jnp.sum(weight, axis=1)
        out = out * shrink[:, None] + setup.dot(weight.astype(value.dtype), value)
        return new, total, out

    n = tiles.rows
    start = jnp.full(n, LOWEST, jnp.float32), jnp.zeros(n, jnp.float32)
    start = (*start, jnp.zeros((n, tiles.value), jnp.float32))
    largest, total, out = _walk(ref, rows, query, visit, start, setup)
    safe = jnp.where(total > 0, total, 1.0)
    store(out_ref, (), rows.start, out / safe[:, None], setup.row_limit, columns)

    @pl.when(tile == 0)
    def _():
        normalizer = jnp.where(total > 0, largest + jnp.log2(safe), jnp.inf)
        store(normalizer_ref, (), rows.start, normalizer, setup.row_limit)


def _gradient_kernel(*refs, names, setup: Setup):
    ref = dict(zip(names, refs, strict=False))
    d_query_ref, d_bias_ref = refs[-2:] if "bias" in ref else (refs[-1], None)
    tiles, limit = setup.tiles, setup.row_limit
    rows = take_rows(ref, (), (), pl.program_id(0), setup)
    query = load(ref["query"], (), rows.start, tiles.rows, limit, slice(None))
    normalizer = load(ref["log_normalizer"], (), rows.start, tiles.rows, limit, other=jnp.inf)
    row_term = load(ref["row_term"], (), rows.start, tiles.rows, limit)

    def d_out(columns):
        return load(ref["out"], (), rows.start, tiles.rows, limit, columns)

    if setup.value_tiles == 1:  # loaded once
        kept = d_out(pl.ds(0, tiles.value))

        def d_out(columns):
            del columns
            return kept

    def visit(d_query, score, key, values, index):
        weight = jnp.exp2(score - normalizer[:, None])
        d_weight = dot_over_values(d_out, values, score.shape, setup)
        d_score = weight * (d_weight - row_term[:, None])
        if d_bias_ref is not None and index is not None:
            index = index + jnp.arange(tiles.columns)
            distance = rows.position[:, None] - index[None, :]
            (place,), listed = bias_place(rows, index, distance, setup)
            # The interpreter wraps negative places; one past the end it drops.
            place = jnp.where(listed, place, d_bias_ref.shape[0])
            plt.store(d_bias_ref.at[place], d_score.astype(d_bias_ref.dtype), mask=listed)
        return d_query + setup.dot(d_score.astype(key.dtype), key)

    zeros = jnp.zeros(query.shape, jnp.float32)
    d_query = _walk(ref, rows, query, visit, zeros, setup)
    store(d_query_ref, (), rows.start, setup.rules.scale * d_query, limit, slice(None))
