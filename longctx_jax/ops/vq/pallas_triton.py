"""Vector-quantised attention on NVIDIA GPUs in Pallas, lowered by Triton: the kernels' front.

`attend_blocks` and its gradients, as `blocks.attend_blocks`, without scores or probabilities in
memory; the search for codes (`pallas_triton_search.py`) and the building of the tables
(`pallas_triton_table.py`). float32 attention multiplies in TF32 (relative error 3e-4), as XLA's
matrix products do by default.

Deprecated upstream from jax 0.11 on. Nothing else imports these files but `select.py` and
`table.py`, when they run them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from longctx_jax.ops.products import accumulator
from longctx_jax.ops.triton_kernels import not_for_hopper
from longctx_jax.ops.vq.blocks import Blocks, Constants, Rules
from longctx_jax.ops.vq.pallas_triton_keys import key_value_gradients, mean_gradient
from longctx_jax.ops.vq.pallas_triton_queries import forward, query_gradient
from longctx_jax.ops.vq.pallas_triton_search import search_codes, search_codes_and_errors
from longctx_jax.ops.vq.pallas_triton_table import tables_before_blocks
from longctx_jax.ops.vq.pallas_triton_tiles import MIN_WIDTH, Setup, Sizes, Tiling, pad_columns
from longctx_jax.typing import DType

__all__ = [
    "attend_blocks",
    "attention_unsupported",
    "search_codes",
    "search_codes_and_errors",
    "search_unsupported",
    "tables_before_blocks",
    "tables_unsupported",
    "tiling",
]

TF32_PRECISIONS = ("default", "fastest", "tensorfloat32", "bfloat16", "TF32_TF32_F32")
MAX_KEY_WIDTH = {"bfloat16": 256, "float32": 128}
MAX_SEARCH_WIDTH = {"bfloat16": 256, "float32": 128}
MAX_TILE = 128  # value columns; padded widths above it are multiples of it
OF_TABLES = ("codebook", "mean", "log_count", "table_document")


def tiling(kernel: str, d_key: int, d_value: int, dtype: DType, block: int) -> Tiling:
    """Returns the tiling of a kernel, named as in reports without "vq_attention_".

    Chosen by compiling for an H200: none of them spills more than 64 bytes of registers
    (results/vq_h200_registers.jsonl). 64 rows are the smallest tile of Hopper's matrix units.

    Args:
        kernel: forward, query_gradient, key_gradient, value_gradient, mean_gradient, or
            key_value_gradient, both at once.
        d_key: padded.
        d_value: padded.
        dtype: of products.
        block: queries a block.
    """
    owns_queries = kernel in ("forward", "query_gradient")
    part = d_value & -d_value  # the largest power of two that divides it
    if jnp.dtype(dtype).itemsize > 2:  # TF32 operands take twice the registers
        rows, columns = (64, 32) if owns_queries else (32, 64)
        tiles = Tiling(rows, columns, min(64, part), 8, 2)
    elif kernel == "forward":
        is_small = max(d_key, min(256, part)) <= 64
        tiles = Tiling(64 if is_small else 128, 64, min(256, part), 4 if is_small else 8, 2)
    elif kernel == "query_gradient":
        if d_key > 128:
            tiles = Tiling(64, 32, min(64, part), 8, 2)
        elif d_value > 128:
            tiles = Tiling(64, 64, 128, 8, 2)
        else:
            is_small = max(d_key, d_value) <= 64
            tiles = Tiling(64 if is_small else 128, 64, part, 4 if is_small else 8, 2)
    elif kernel == "key_value_gradient":
        is_small = max(d_key, d_value) <= 64
        tiles = Tiling(64, 64, part, 4, 2) if is_small else Tiling(32, 128, min(128, part), 8, 2)
    elif kernel == "key_gradient":
        rows, n_warps = (64, 4) if d_key <= 128 else (32, 8)
        tiles = Tiling(rows, 64, min(128, part), n_warps, 2)
    elif d_key <= 128:  # value_gradient, mean_gradient
        tiles = Tiling(64, 128, min(256, part), 8, 2)
    else:
        tiles = Tiling(64, 128, min(128, part), 8, 2)
    rows = min(tiles.rows, max(MIN_WIDTH, pl.next_power_of_2(block)))
    return dataclasses.replace(tiles, rows=rows)


def attention_unsupported(facts: Any) -> str:
    """Returns why the kernels cannot attend, "" if they can."""
    if reason := _device_unsupported(facts):
        return reason
    precision = getattr(jax.config, "jax_default_matmul_precision", None) or "default"
    if facts.dtype == "float32" and precision not in TF32_PRECISIONS:
        return f"multiplies float32 in TF32, and matmul precision is {precision}"
    limit = MAX_KEY_WIDTH[facts.dtype]
    if facts.d_key > limit:
        return f"{facts.dtype} keys wider than {limit} do not fit the registers: {facts.d_key}"
    return ""


def search_unsupported(facts: Any) -> str:
    """Returns why the kernel cannot search for codes, "" if it can."""
    if reason := _device_unsupported(facts):
        return reason
    limit = MAX_SEARCH_WIDTH[facts.dtype]
    if facts.d_key > limit:
        return f"{facts.dtype} vectors wider than {limit} do not fit shared memory: {facts.d_key}"
    return ""


def tables_unsupported(facts: Any) -> str:
    """Returns why the kernel cannot build the tables, "" if it can."""
    return _device_unsupported(facts)


def _device_unsupported(facts: Any) -> str:
    return not_for_hopper(facts, ("float32", "bfloat16"))


def attend_blocks(
    rules: Rules, blocks: Blocks, constants: Constants, *, interpret: bool = False
) -> jax.Array:
    """Returns what `blocks.attend_blocks` returns, with the same gradients.

    Cost: see `forward`, `query_gradient`, `key_value_gradients`, `mean_gradient`; memory beside
    inputs and outputs: 8 bytes a query and head, the means in the dtype of the values.
    """
    return _attend(rules, interpret, blocks, constants)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rules: Rules, interpret: bool, blocks: Blocks, constants: Constants):
    return _attend_forward(rules, interpret, blocks, constants)[0]


def _attend_forward(rules: Rules, interpret: bool, blocks: Blocks, constants: Constants):
    # The means of the residuals have the dtype of products: half as large where that is bfloat16.
    mean_like = jnp.zeros((0,), blocks.mean.dtype)
    blocks = blocks._replace(mean=blocks.mean.astype(_dtype(blocks)))
    arrays = _arrays(rules, blocks, constants)
    setup = _setup("forward", rules, blocks, arrays, interpret)
    out, log_normalizer = forward(arrays, setup, interpret=interpret)
    out = out[..., : blocks.value.shape[-1]].astype(blocks.value.dtype)
    return out, (blocks, constants, out, log_normalizer, mean_like)


def _attend_backward(rules: Rules, interpret: bool, saved, d_out):
    blocks, constants, out, log_normalizer, mean_like = saved
    arrays = _arrays(rules, blocks, constants)
    wide = accumulator(d_out)
    row_term = jnp.sum(d_out.astype(wide) * out.astype(wide), -1)
    given = pad_columns(d_out.astype(arrays["value"].dtype), arrays["value"].shape[-1])
    arrays |= {"out": given, "log_normalizer": log_normalizer, "row_term": row_term}

    def setup(kernel):
        return _setup(kernel, rules, blocks, arrays, interpret)

    bias_dtype = None if blocks.bias is None else blocks.bias.dtype
    options = {"interpret": interpret}
    d_query, d_bias = query_gradient(arrays, bias_dtype, setup("query_gradient"), **options)
    of_keys = {name: x for name, x in arrays.items() if name not in (*OF_TABLES, "first_key")}
    if setup("key_value_gradient").value_tiles == 1:
        asked = options | {"with_key": True, "with_value": True}
        d_key, d_value = key_value_gradients(of_keys, setup("key_value_gradient"), **asked)
    else:
        asked = options | {"with_key": True, "with_value": False}
        (d_key,) = key_value_gradients(of_keys, setup("key_gradient"), **asked)
        asked = options | {"with_key": False, "with_value": True}
        of_values = {name: x for name, x in of_keys.items() if name not in ("value", "row_term")}
        (d_value,) = key_value_gradients(of_values, setup("value_gradient"), **asked)
    d_mean = jnp.zeros(blocks.mean.shape, mean_like.dtype)
    if rules.use_table and rules.grad_through_cache:
        names = (*OF_TABLES, "query", "query_document", "out", "log_normalizer")
        of_means = {name: arrays[name] for name in names if name != "mean"}
        d_mean = mean_gradient(of_means, setup("mean_gradient"), **options)
        d_mean = d_mean[..., : blocks.mean.shape[-1]].astype(mean_like.dtype)
    if blocks.bias is not None and d_bias is not None:
        d_bias = d_bias.reshape(blocks.bias.shape)
    return Blocks(
        d_query[..., : blocks.query.shape[-1]].astype(blocks.query.dtype),
        d_key[..., : blocks.key.shape[-1]].astype(blocks.key.dtype),
        d_value[..., : blocks.value.shape[-1]].astype(blocks.value.dtype),
        d_bias,
        d_mean,
    ), None


_attend.defvjp(_attend_forward, _attend_backward)


def _dtype(blocks: Blocks):
    return jnp.result_type(blocks.query, blocks.key, blocks.value)


def _arrays(rules: Rules, blocks: Blocks, constants: Constants) -> dict[str, jax.Array]:
    """Returns what kernels read, by name: in one dtype, key and value widths padded to tiles."""
    dtype = _dtype(blocks)
    key_width = max(MIN_WIDTH, pl.next_power_of_2(blocks.query.shape[-1]))
    value_width = value_unit(blocks.value.shape[-1])
    arrays = {
        "query": pad_columns(blocks.query.astype(dtype), key_width),
        "key": pad_columns(blocks.key.astype(dtype), key_width),
        "value": pad_columns(blocks.value.astype(dtype), value_width),
        "query_document": constants.query_document,
        "key_document": constants.key_document,
        "first_key": _first_keys(blocks, constants)[..., None],
    }
    if blocks.bias is not None:
        arrays["bias"] = blocks.bias.reshape(*blocks.bias.shape[:-2], -1)
    if rules.use_table:
        arrays |= {
            "codebook": pad_columns(constants.codebook.astype(dtype), key_width),
            "mean": pad_columns(blocks.mean, value_width),
            "log_count": jnp.log2(constants.count.astype(jnp.float32)),  # -inf: an empty code
            "table_document": constants.table_document[..., None],
        }
    return arrays


def value_unit(d_value: int) -> int:
    """Returns the number that padded value columns are a multiple of."""
    return min(MAX_TILE, max(MIN_WIDTH, pl.next_power_of_2(d_value)))


def _first_keys(blocks: Blocks, constants: Constants) -> jax.Array:
    """Returns the first key that any query of each block may see, int32 [blocks, batch].

    The first one whose document is not older than the block's oldest; documents before it are not
    the queries', whatever their order.
    """
    n_blocks, block = blocks.query.shape[0], blocks.query.shape[-2]
    n_seen = blocks.key.shape[2] - (n_blocks - 1) * block
    index = block * jnp.arange(n_blocks)[:, None] + jnp.arange(n_seen)
    document = jnp.moveaxis(constants.key_document[:, index], 1, 0)  # [blocks, batch, seen]
    query = constants.query_document
    oldest = jnp.min(jnp.where(query < 0, jnp.iinfo(jnp.int32).max, query), axis=-1)
    first = jnp.where(document >= oldest[..., None], index[:, None], index[:, None, -1:] + 1)
    return jnp.min(first, axis=-1).astype(jnp.int32)


def _setup(kernel: str, rules: Rules, blocks: Blocks, arrays, interpret: bool) -> Setup:
    n_blocks, batch, kv_heads, group, block, d_key = arrays["query"].shape
    sizes = Sizes(
        n_blocks=n_blocks,
        batch=batch,
        kv_heads=kv_heads,
        group=group,
        block=block,
        d_key=d_key,
        d_value=arrays["value"].shape[-1],
        n_keys=blocks.key.shape[2],
        n_codes=blocks.mean.shape[-2],
        n_distances=0 if blocks.bias is None else blocks.bias.shape[-1],
    )
    dtype = arrays["query"].dtype
    tiles = tiling(kernel, d_key, sizes.d_value, dtype, block)
    return Setup(rules, sizes, tiles, interpret and dtype.itemsize > 2)
