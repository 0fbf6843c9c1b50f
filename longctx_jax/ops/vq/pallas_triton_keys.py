"""Triton kernels that own a tile of keys or codes: gradients of keys, values and table means.

A key is seen by queries of several blocks, a code of one block's table by all queries of the block.
A program owns a tile of them and walks the tiles of queries that see it, so nothing is summed by
atomics, and key heads that several query heads share are walked once for each:

    P^T = exp2(S^T - log-normaliser),   dV = sum P^T dO,   dm alike,
    dS^T = P^T (V dO^T - sum dO O),     dk = scale sum dS^T q    over distances <= window_len.

Transposed scores come from a product of their own: transposing a product that feeds another one is
miscompiled by some versions of Triton on Hopper.

Source: Dao et al. (2022), arXiv 2205.14135; Lingle (2023), arXiv 2309.16354, section 3.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from longctx_jax.ops.triton_kernels import quietly
from longctx_jax.ops.vq.pallas_triton_tiles import (
    Setup,
    any_of,
    code_scores,
    dot_over_values,
    key_scores,
    load,
    load_key_documents,
    specs,
    store,
    take_rows,
)


def key_value_gradients(
    arrays: dict[str, jax.Array],
    setup: Setup,
    *,
    with_key: bool,
    with_value: bool,
    interpret: bool,
) -> tuple[jax.Array, ...]:
    """Returns d_key, d_value or both, of the keys of window and blocks.

    Args:
        arrays: by name, padded, with out (its gradient), log_normalizer and row_term.
        setup: of the kernel.
        with_key: the keys' gradient; sums dO V^T over tiles of value columns.
        with_value: the values' gradient; its columns are split over programs, so with more than
            one tile of them, ask for it alone.
        interpret: run in the interpreter, anywhere.

    Cost: with r queries that see a key (window_len to before + block) and t value tiles, 2 r group
    flops times: key + value both ways for the keys, t key + value for the values (both at once:
    one score product less); reads r group (key + value) items a tile of keys from the second-level
    cache, writes each gradient once.
    """
    sizes, tiles, key = setup.sizes, setup.tiles, arrays["key"]
    out_shape = {}
    if with_key:
        out_shape["key"] = jax.ShapeDtypeStruct(key.shape, key.dtype)
    if with_value:
        out_shape["value"] = jax.ShapeDtypeStruct((*key.shape[:3], sizes.d_value), key.dtype)
    assert not (with_key and with_value) or setup.value_tiles == 1
    value_tiles = setup.value_tiles if with_value else 1

    def place(tile, column, row):
        del tile, column
        return {"b": row // sizes.kv_heads, "h": row % sizes.kv_heads}

    run = pl.pallas_call(
        functools.partial(_key_kernel, names=tuple(arrays), wanted=tuple(out_shape), setup=setup),
        grid=(pl.cdiv(sizes.n_keys, tiles.columns), value_tiles, sizes.batch * sizes.kv_heads),
        in_specs=specs(arrays, place),
        out_specs=specs(out_shape, place),
        out_shape=list(out_shape.values()),
        compiler_params=plt.CompilerParams(num_warps=tiles.n_warps, num_stages=tiles.n_stages),
        interpret=interpret,
        name=f"vq_attention_{'_'.join(out_shape)}_gradient",
    )
    return tuple(quietly(run, *arrays.values()))


def mean_gradient(arrays: dict[str, jax.Array], setup: Setup, *, interpret: bool) -> jax.Array:
    """Returns d_mean, float32 [blocks, batch, kv_heads, codes, value].

    Args:
        arrays: as in `key_value_gradients`.
        setup: of the kernel.
        interpret: run in the interpreter, anywhere.

    Cost: 2 codes (t key + value) flops a query for t value tiles; reads the block's queries and
    output gradients once a tile of codes from the second-level cache; writes 4 codes value bytes
    a block and key head.
    """
    sizes, tiles = setup.sizes, setup.tiles

    def place(step, column, _):  # tiles of one table next to each other: they read the same rows
        del column
        row = step // setup.code_tiles
        block, pair = row // (sizes.batch * sizes.kv_heads), row % (sizes.batch * sizes.kv_heads)
        return {"n": block, "b": pair // sizes.kv_heads, "h": pair % sizes.kv_heads}

    shape = (sizes.n_blocks, sizes.batch, sizes.kv_heads, sizes.n_codes, sizes.d_value)
    out_shape = {"mean": jax.ShapeDtypeStruct(shape, jnp.float32)}
    run = pl.pallas_call(
        functools.partial(_mean_kernel, names=tuple(arrays), setup=setup),
        grid=(
            sizes.n_blocks * sizes.batch * sizes.kv_heads * setup.code_tiles,
            setup.value_tiles,
            1,
        ),
        in_specs=specs(arrays, place),
        out_specs=specs(out_shape, place),
        out_shape=list(out_shape.values()),
        compiler_params=plt.CompilerParams(num_warps=tiles.n_warps, num_stages=tiles.n_stages),
        interpret=interpret,
        name="vq_attention_mean_gradient",
    )
    return quietly(run, *arrays.values())[0]


def _seen_by(start, document, setup: Setup, *, is_limited: bool):
    """Returns the first tile of queries that may see keys from start on, and how many follow.

    Queries from the first key's own position to the end of the last block in whose window a key
    stands; where distances count up to window_len only, no farther. None for padding.
    """
    sizes, tiles = setup.sizes, setup.tiles

    def tile_of(query):
        block = jax.lax.div(query, sizes.block)
        return block * setup.row_tiles + jax.lax.div(query - block * sizes.block, tiles.rows)

    last_key = jnp.minimum(start + tiles.columns, sizes.n_keys) - 1
    first = jnp.maximum(start - sizes.before, 0)
    last_block = jnp.minimum(jax.lax.div(last_key, sizes.block), sizes.n_blocks - 1)
    last = (last_block + 1) * sizes.block - 1
    if is_limited:
        last = jnp.minimum(last, last_key + setup.rules.window_len - sizes.before)
    is_seen = (last >= first) & any_of(document >= 0)
    last = jnp.maximum(last, 0)
    return tile_of(first), jnp.where(is_seen, tile_of(last) - tile_of(first) + 1, 0)


def _load_rows(ref, at, document_at, step, setup: Setup):
    """Returns a tile of queries with its normaliser, and a loader of its output gradient."""
    rows = take_rows(ref, at, document_at, step, setup)
    n, limit = setup.tiles.rows, setup.row_limit
    query = load(ref["query"], at, rows.start, n, limit, slice(None))
    normalizer = load(ref["log_normalizer"], at, rows.start, n, limit, other=jnp.inf)

    def d_out(columns):
        return load(ref["out"], at, rows.start, n, limit, columns)

    return rows, query, normalizer, d_out


def _key_kernel(*refs, names, wanted, setup: Setup):
    ref = dict(zip(names, refs, strict=False))
    out = dict(zip(wanted, refs[len(names) :], strict=True))
    rules, sizes, tiles = setup.rules, setup.sizes, setup.tiles
    n, width, limit = tiles.columns, tiles.value, setup.key_limit
    start = pl.program_id(0) * n
    columns = pl.ds(pl.program_id(1) * width, width)
    key = load(ref["key"], (), start, n, limit, slice(None))
    document = load_key_documents(ref, start, setup)
    index = start + jnp.arange(n)
    is_value_limited = not (rules.use_table and rules.grad_through_cache)
    is_limited = is_value_limited or "value" not in out
    first, count = _seen_by(start, document, setup, is_limited=is_limited)

    def value(columns):
        return load(ref["value"], (), start, n, limit, columns)

    if setup.value_tiles == 1 and "key" in out:  # loaded once
        kept = value(pl.ds(0, width))

        def value(columns):
            del columns
            return kept

    def visit(i, carry):
        group = jax.lax.div(i, count)
        step = first + i - group * count
        block = jax.lax.div(step, setup.row_tiles)
        at = (block, group)
        rows, query, normalizer, d_out = _load_rows(ref, at, (block,), step, setup)
        score, distance = key_scores(ref, rows, query, start, key, document, setup, transposed=True)
        # What left the window before the block is in its table.
        in_window = (index >= block * sizes.block)[:, None]
        weight = jnp.where(in_window, jnp.exp2(score - normalizer[None, :]), 0.0)
        is_near = distance <= rules.window_len
        new = {}
        if "value" in out:
            given = d_out(columns)
            seen = jnp.where(is_near, weight, 0.0) if is_value_limited else weight
            new["value"] = carry["value"] + setup.dot(seen.astype(given.dtype), given)
        if "key" in out:
            row_term = load(ref["row_term"], at, rows.start, tiles.rows, setup.row_limit)
            d_weight = dot_over_values(value, d_out, (n, tiles.rows), setup)
            d_score = jnp.where(is_near, weight * (d_weight - row_term[None, :]), 0.0)
            new["key"] = carry["key"] + setup.dot(d_score.astype(query.dtype), query)
        return new

    widths = {"key": sizes.d_key, "value": width}
    zeros = {name: jnp.zeros((n, widths[name]), jnp.float32) for name in out}
    total = jax.lax.fori_loop(0, count * sizes.group, visit, zeros)
    store_limit = sizes.n_keys if sizes.n_keys % n else None
    if "key" in out:
        d_key = rules.scale * total["key"]
        store(out["key"], (), start, d_key, store_limit, slice(None))
    if "value" in out:
        store(out["value"], (), start, total["value"], store_limit, columns)


def _mean_kernel(*refs, names, setup: Setup):
    ref, out_ref = dict(zip(names, refs, strict=False)), refs[-1]
    sizes, tiles = setup.sizes, setup.tiles
    start = jax.lax.rem(pl.program_id(0), setup.code_tiles) * tiles.columns
    columns = pl.ds(pl.program_id(1) * tiles.value, tiles.value)
    word = load(ref["codebook"], (), start, tiles.columns, setup.code_limit, slice(None))

    def visit(i, total):
        group = jax.lax.div(i, setup.row_tiles)
        step = i - group * setup.row_tiles
        rows, query, normalizer, d_out = _load_rows(ref, (group,), (), step, setup)
        score = code_scores(ref, (), rows, query, start, word, setup, transposed=True)
        weight = jnp.exp2(score - normalizer[None, :])
        given = d_out(columns)
        return total + setup.dot(weight.astype(given.dtype), given)

    is_used = ref["table_document"][0] >= 0
    count = is_used.astype(jnp.int32) * (sizes.group * setup.row_tiles)
    zeros = jnp.zeros((tiles.columns, tiles.value), jnp.float32)
    total = jax.lax.fori_loop(0, count, visit, zeros)
    store(out_ref, (), start, total, setup.code_limit, columns)
