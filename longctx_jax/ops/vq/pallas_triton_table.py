"""The tables before blocks as one Triton kernel: a walk over the blocks with means in registers.

    n' = kept n + n_b,   m' = (kept n m + sum onehot(z_j) v_j) / n',   kept = same document

A program owns a tile of codes and of value columns of one head. For each block it writes the table,
then adds the block's tokens by products of one-hot codes and values: exact for bfloat16 values,
three TF32 products for float32 ones. The gradient is a walk back in plain JAX.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from longctx_jax.ops.products import accumulator
from longctx_jax.ops.triton_kernels import quietly
from longctx_jax.ops.vq.pallas_triton_tiles import MIN_WIDTH, load, pad_columns, store
from longctx_jax.ops.vq.table import NO_DOCUMENT, Table
from longctx_jax.typing import Array, DType, Float, Int


@dataclasses.dataclass(frozen=True)
class TableTiling:
    """How the walk is cut up.

    Attributes:
        codes: codes a tile.
        value: value columns a tile.
        tokens: tokens a product.
        n_warps: warps a program.
        n_stages: depth of the software pipeline of its loads.
    """

    codes: int
    value: int
    tokens: int
    n_warps: int
    n_stages: int


def tiling(d_value: int, dtype: DType) -> TableTiling:
    """Returns the tiling for a padded width, chosen as those of attention are."""
    part = d_value & -d_value
    if jnp.dtype(dtype).itemsize > 2:
        return TableTiling(64, min(64, part), 32, 4, 2)
    return TableTiling(64, min(128, part), 64, 8 if part > 64 else 4, 2)


def tables_before_blocks(
    table: Table,
    codes: Int[Array, "blocks batch kv_heads block"],
    value: Float[Array, "blocks batch kv_heads block value"],
    documents: Int[Array, "blocks batch block"],
    *,
    interpret: bool = False,
    tiles: TableTiling | None = None,
) -> Table:
    """Returns the tables after 0, 1, ... blocks have been filed, as `table.tables_before_blocks`.

    Cost: 2 codes value flops a token and key head; reads the values once a tile of codes from the
    second-level cache, writes 4 codes (value + 1) bytes a block and key head. Backwards: 4 value
    bytes a token and two of the above a block.
    """
    last = jnp.concatenate([table.document[None], jnp.max(documents, axis=-1)])
    document = jax.lax.cummax(last, axis=0)  # of the tables, [blocks + 1, batch]
    is_filed = (documents == document[1:, :, None]) & (documents != NO_DOCUMENT)
    slots = jnp.where(is_filed[:, :, None], codes, -1).astype(jnp.int32)
    is_kept = (document[1:] == document[:-1]).astype(jnp.int32)
    run = _means(interpret, tiles)
    mean, count = run(table.mean, value, table.count, slots, is_kept)
    return Table(mean, count, document)


@functools.cache
def _means(interpret: bool, tiles: TableTiling | None):
    """Returns (mean, value, count, slots, is_kept) -> (means, counts), differentiable."""

    def forward(mean, value, count, slots, is_kept):
        means, counts = _walk(mean, value, count, slots, is_kept, tiles, interpret)
        like = jnp.zeros((0,), value.dtype)
        return (means, counts), (counts, slots, is_kept, like)

    def backward(saved, given):
        counts, slots, is_kept, like = saved
        return (*_pull(given[0], counts, slots, is_kept, like.dtype), None, None, None)

    run = jax.custom_vjp(lambda *arrays: forward(*arrays)[0])
    run.defvjp(forward, backward)
    return run


def _pull(d_means, counts, slots, is_kept, value_dtype):
    """Returns gradients of the first mean and of the values, walking back over the blocks.

    With u = sum over later tables of the document of dm / n, code by code, a value filed under s
    gets u[s], and the first mean gets its count times u.
    """
    dtype = accumulator(d_means)
    share = 1.0 / jnp.maximum(counts, 1).astype(dtype)

    def step(later, inputs):
        d_mean, share, slots, kept = inputs
        later = later + d_mean.astype(dtype) * share[..., None]
        index = jnp.broadcast_to(jnp.maximum(slots, 0)[..., None], (*slots.shape, later.shape[-1]))
        d_value = jnp.where(slots[..., None] < 0, 0.0, jnp.take_along_axis(later, index, axis=2))
        return later * kept[:, None, None, None].astype(dtype), d_value.astype(value_dtype)

    inputs = d_means[1:], share[1:], slots, is_kept
    later, d_value = jax.lax.scan(step, jnp.zeros(d_means.shape[1:], dtype), inputs, reverse=True)
    d_first = later * counts[0, ..., None].astype(dtype) + d_means[0]
    return d_first.astype(d_means.dtype), d_value


def _walk(mean, value, count, slots, is_kept, tiles, interpret):
    n_blocks, batch, kv_heads, block, d_value = value.shape
    n_codes = count.shape[-1]
    unit = min(128, max(MIN_WIDTH, pl.next_power_of_2(d_value)))
    if value.dtype != jnp.bfloat16:
        value = value.astype(jnp.float32)
    value = pad_columns(value, unit)
    mean = pad_columns(mean.astype(jnp.float32), unit)
    width = value.shape[-1]
    tiles = tiles or tiling(width, value.dtype)
    axes = {"n": n_blocks, "m": n_blocks + 1, "b": batch, "h": kv_heads}
    axes |= {"t": block, "z": n_codes, "v": width}

    def spec(names):  # batch and heads at an index, the rest whole
        shape = tuple(None if a in "bh" else axes[a] for a in names)

        def index(code, column, row):
            del code, column
            at = {"b": row // kv_heads, "h": row % kv_heads}
            return tuple(at.get(a, 0) for a in names)

        return pl.BlockSpec(shape, index)

    run = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, is_exact=interpret),
        grid=(pl.cdiv(n_codes, tiles.codes), width // tiles.value, batch * kv_heads),
        in_specs=[spec("bhzv"), spec("nbhtv"), spec("bhz"), spec("nbht"), spec("nb")],
        out_specs=[spec("mbhzv"), spec("mbhz")],
        out_shape=[
            jax.ShapeDtypeStruct((n_blocks + 1, batch, kv_heads, n_codes, width), jnp.float32),
            jax.ShapeDtypeStruct((n_blocks + 1, batch, kv_heads, n_codes), jnp.int32),
        ],
        compiler_params=plt.CompilerParams(num_warps=tiles.n_warps, num_stages=tiles.n_stages),
        interpret=interpret,
        name="vq_tables_before_blocks",
    )
    means, counts = quietly(run, mean, value, count, slots, is_kept)
    return means[..., :d_value], counts


def _kernel(
    mean_ref, value_ref, count_ref, slot_ref, kept_ref, means_ref, counts_ref, *, tiles, is_exact
):
    n_blocks, block, _ = value_ref.shape
    n_codes = count_ref.shape[0]
    limit = n_codes if n_codes % tiles.codes else None
    token_limit = block if block % tiles.tokens else None
    start = pl.program_id(0) * tiles.codes
    column = pl.program_id(1)
    columns = pl.ds(column * tiles.value, tiles.value)
    code = start + jnp.arange(tiles.codes)
    precision = None
    if value_ref.dtype == jnp.float32:
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = jax.lax.Precision.HIGHEST if is_exact else precision

    def write(n, mean, count):
        store(means_ref, (n,), start, mean, limit, columns)

        @pl.when(column == 0)
        def _():
            store(counts_ref, (n,), start, count, limit)

    def advance(n, table):
        mean, count = table
        write(n, mean, count)
        kept = count * kept_ref[n]
        total = mean * kept.astype(jnp.float32)[:, None]

        def add(i, sums):
            total, count = sums
            at = i * tiles.tokens
            slot = load(slot_ref, (n,), at, tiles.tokens, token_limit, other=-1)
            value = load(value_ref, (n,), at, tiles.tokens, token_limit, columns)
            is_one = code[:, None] == slot[None, :]
            count = count + jnp.sum(is_one.astype(jnp.int32), axis=1)
            total = total + plt.dot(is_one.astype(value.dtype), value, precision=precision)
            return total, count

        total, count = jax.lax.fori_loop(0, pl.cdiv(block, tiles.tokens), add, (total, kept))
        return total / jnp.maximum(count, 1).astype(jnp.float32)[:, None], count

    first = load(mean_ref, (), start, tiles.codes, limit, columns)
    table = first, load(count_ref, (), start, tiles.codes, limit)
    mean, count = jax.lax.fori_loop(0, n_blocks, advance, table)
    write(jnp.int32(n_blocks), mean, count)
