"""Kernels of decay attention."""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.benchmarking import deviceless
from longctx_jax.ops.decay import pallas_mosaic_gpu, pallas_triton

WIDTHS = {  # (backend, dtype) -> (key, value) widths
    ("pallas_triton", "bfloat16"): (
        (16, 64),
        (32, 32),
        (64, 64),
        (64, 128),
        (128, 64),
        (128, 128),
        (256, 256),
    ),
    ("pallas_triton", "float32"): ((16, 16), (32, 32), (64, 64), (64, 128), (128, 128)),
    ("pallas_mosaic_gpu", "bfloat16"): ((64, 64), (64, 128), (128, 64), (128, 128)),
}


def cases() -> list[dict[str, Any]]:
    """Returns the classes of calls that the decay kernels take."""
    kinds = itertools.product(("constant", "per_token"), (False, True), (4096, 4000))
    return [
        {
            "backend": backend,
            "dtype": dtype,
            "d_key": d_key,
            "d_value": d_value,
            "decay": decay,
            "is_backwards": is_backwards,
            "seq": seq,
            "batch": 1,
            "heads": 16,
        }
        for decay, is_backwards, seq in kinds
        for (backend, dtype), widths in WIDTHS.items()
        for d_key, d_value in widths
    ]


def compile_case(case: dict[str, Any], log: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of one class of calls of decay attention."""

    def array(*shape, dtype=case["dtype"]) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    batch, seq, heads = case["batch"], case["seq"], case["heads"]
    x = array(batch, seq, heads, case["d_key"])
    z = array(batch, seq, heads, case["d_value"])
    decay = (heads,) if case["decay"] == "constant" else (batch, seq, heads)
    state = array(batch, heads, case["d_key"], case["d_value"], dtype=jnp.float32)
    walk = functools.partial(
        {"pallas_triton": pallas_triton, "pallas_mosaic_gpu": pallas_mosaic_gpu}[
            case["backend"]
        ].walk,
        reset=None,
        scale=1.0,
        is_backwards=case["is_backwards"],
        out_dtype=jnp.dtype(case["dtype"]),
    )
    arguments = [x, x, z, array(*decay, dtype=jnp.float32), state]
    compiled = deviceless.compile_for_h200(walk, arguments, log)
    if case["backend"] == "pallas_triton":
        widths = case["d_key"], case["d_value"]
        tiles = pallas_triton.tiling(*widths, case["dtype"], batch * heads, seq)
        case = case | {"tiling": dataclasses.asdict(tiles)}
    return [case | kernel for kernel in compiled]
