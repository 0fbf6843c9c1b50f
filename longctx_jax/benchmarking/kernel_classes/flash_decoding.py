"""The kernel of one query against a cache."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.benchmarking import deviceless
from longctx_jax.ops import flash_decoding
from longctx_jax.ops.position import DistanceBias

# (query heads of a key head, key heads, key width, value width); 0 = values are part of the keys
CACHED = (
    (1, 16, 64, 64),  # as many key heads as query heads
    (4, 8, 64, 64),
    (4, 8, 128, 128),
    (32, 1, 128, 128),
    (4, 4, 256, 256),
    (32, 1, 128, 0),  # rows that the query absorbs the projections of
    (32, 1, 512, 0),
    (32, 1, 576, 512),  # with rotary numbers beside them
    (12, 1, 768, 0),
    (16, 1, 1024, 0),
    (16, 1, 1088, 1024),
    (32, 1, 2048, 0),
    (32, 1, 2112, 2048),
)


def cases() -> list[dict[str, Any]]:
    """Returns the classes of calls that the kernel for one query takes; 5,000 fills no tiles."""
    return [
        {
            "backend": "pallas_triton",
            "dtype": "bfloat16",
            "group": group,
            "kv_heads": kv_heads,
            "d_key": d_key,
            "d_value": d_value or d_key,
            "rows_are_both": kv_heads == 1 and d_value != d_key,
            "has_bias": has_bias,
            "layers": 16,
            "batch": 1,
            "keys": keys,
        }
        for has_bias, keys in ((False, 131_072), (True, 131_072), (False, 5000))
        for group, kv_heads, d_key, d_value in CACHED
    ]


def compile_case(case: dict[str, Any], log: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the row of one class of calls."""

    def array(*shape, dtype=case["dtype"]) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    heads, widths = case["group"] * case["kv_heads"], (case["d_key"], case["d_value"])
    shape = case["layers"], case["batch"], case["kv_heads"], case["keys"]

    def run(query, key, value, distance, table, layer):
        bias = None if table is None else DistanceBias(table)
        options = {"scale": 1.0, "d_value": case["d_value"], "layer": layer}
        return flash_decoding.attend(query, key, value, distance, bias, **options)

    arguments = [
        array(case["batch"], heads, case["d_key"]),
        array(*shape, case["d_key"]),
        None if case["rows_are_both"] else array(*shape, case["d_value"]),
        array(case["batch"], case["keys"], dtype="int32"),
        array(heads, 32, dtype="float32") if case["has_bias"] else None,
        array(dtype="int32"),
    ]
    tiles = flash_decoding.tiling(*widths, case["group"], case["dtype"])
    rows = deviceless.compile_for_h200(run, arguments, log)
    return [case | {"tiling": dataclasses.asdict(tiles)} | row for row in rows]
