"""Kernels of attention over quantised keys: attention and its gradients, search, tables."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.benchmarking import deviceless
from longctx_jax.ops.vq import pallas_triton, pallas_triton_search, pallas_triton_table
from longctx_jax.ops.vq.blocks import Blocks, Constants, Rules
from longctx_jax.ops.vq.table import Table

WIDTHS = {  # dtype -> (key, value) widths: heads of attention, and gated units
    "bfloat16": (
        (32, 32),
        (64, 64),
        (64, 128),
        (128, 64),
        (128, 128),
        (128, 1536),
        (256, 256),
        (256, 1536),
    ),
    "float32": ((32, 32), (64, 64), (128, 128), (128, 1536)),
}


def cases() -> list[dict[str, Any]]:
    """Returns the classes of calls that the kernels of vector-quantised attention take.

    Block 512 fills tiles, 500 does not; 64 and 16 have shorter tiles of queries.
    """
    cases = [
        {"dtype": dtype, "d_key": d_key, "d_value": d_value, "has_bias": has_bias, "block": block}
        for has_bias, block in ((True, 512), (True, 500), (True, 64), (False, 512))
        for dtype, widths in WIDTHS.items()
        for d_key, d_value in widths
    ]
    rules = {"use_table": True, "grad_through_cache": True}
    cases = [case | rules for case in cases]
    usual = cases[1]
    cases += [usual | {"use_table": False}, usual | {"grad_through_cache": False}]
    cases += [usual | {"block": 16}]
    shape = {"blocks": 8, "batch": 1, "kv_heads": 4, "group": 2, "window_len": 512, "codes": 512}
    return [{"backend": "pallas_triton", **case, **shape} for case in cases]


def compile_case(case: dict[str, Any], log: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of one class of calls: attention and its gradients, search, tables."""
    n, batch, heads, group = (case[name] for name in ("blocks", "batch", "kv_heads", "group"))
    block, window, codes = case["block"], case["window_len"], case["codes"]
    d_key, d_value = case["d_key"], case["d_value"]
    before = -(-window // block) * block

    def array(*shape, dtype=case["dtype"]) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    blocks = Blocks(
        query=array(n, batch, heads, group, block, d_key),
        key=array(batch, heads, before + n * block, d_key),
        value=array(batch, heads, before + n * block, d_value),
        bias=array(n, batch, heads, group, block, window + 1) if case["has_bias"] else None,
        mean=array(n, batch, heads, codes, d_value, dtype="float32"),
    )
    constants = Constants(
        codebook=array(heads, codes, d_key, dtype="float32"),
        count=array(n, batch, heads, codes, dtype="int32"),
        query_document=array(n, batch, block, dtype="int32"),
        key_document=array(batch, before + n * block, dtype="int32"),
        table_document=array(n, batch, dtype="int32"),
    )
    rules = Rules(window, d_key**-0.5, case["use_table"], case["grad_through_cache"])

    def attend(blocks, constants, d_out):
        out, pull = jax.vjp(
            lambda blocks: pallas_triton.attend_blocks(rules, blocks, constants), blocks
        )
        return out, pull(d_out)

    def prepare(vectors, codebook, table, codes, values, documents):
        found = pallas_triton.search_codes(vectors, codebook)
        return found, pallas_triton.tables_before_blocks(table, codes, values, documents)

    d_out = array(*blocks.query.shape[:-1], d_value)
    rows = deviceless.compile_for_h200(attend, [blocks, constants, d_out], log)
    table = Table(
        mean=array(batch, heads, codes, d_value, dtype="float32"),
        count=array(batch, heads, codes, dtype="int32"),
        document=array(batch, dtype="int32"),
    )
    arguments = [
        array(batch, n * block, heads, d_key),
        constants.codebook,
        table,
        array(n, batch, heads, block, dtype="int32"),
        array(n, batch, heads, block, d_value),
        constants.query_document,
    ]
    if case["has_bias"]:  # they know of no bias: once is enough
        rows += deviceless.compile_for_h200(prepare, arguments, log)
    return [case | {"tiling": _vq_tiling(row["kernel"], case)} | row for row in rows]


def _vq_tiling(kernel: str, case: dict[str, Any]) -> dict[str, int]:
    if kernel == "vq_search_codes":
        return dataclasses.asdict(pallas_triton_search.TILING)
    if kernel == "vq_tables_before_blocks":
        return dataclasses.asdict(pallas_triton_table.tiling(case["d_value"], case["dtype"]))
    name = kernel.removeprefix("vq_attention_")
    widths = case["d_key"], case["d_value"]
    return dataclasses.asdict(pallas_triton.tiling(name, *widths, case["dtype"], case["block"]))
