"""Compiles the decay kernels for an H200 without one: python -m scripts.compile_report --out=FILE.

Writes a JSON line a kernel with its registers and spills, and fails if one that "auto" may take
spills more than 64 bytes. What it needs: `longctx_jax/benchmarking/deviceless.py`.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from typing import Any

from absl import flags

from scripts import common

_OUT = flags.DEFINE_string("out", "results/decay_h200_registers.jsonl", "JSON-lines file.")
SPILL_LIMIT = 64  # bytes
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
    """Returns the classes of calls that the kernels take."""
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
    """Returns the rows of one class of calls."""
    import jax
    import jax.numpy as jnp

    from longctx_jax.benchmarking import deviceless
    from longctx_jax.ops.decay import pallas_mosaic_gpu, pallas_triton

    def array(*shape, dtype=case["dtype"]):
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


def main(arguments: list[str]) -> None:
    """Compiles, writes, prints the worst."""
    del arguments
    from longctx_jax.benchmarking import deviceless

    log = deviceless.prepare_environment()
    import jax

    out = pathlib.Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, case in enumerate(every := cases()):
        rows += compile_case(case, log)
        print(f"\r{number + 1} of {len(every)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    fields = {"device": "NVIDIA H200 (compiled without one)", "jax_version": jax.__version__}
    fields["command"] = "python -m scripts.compile_report"
    out.write_text("".join(json.dumps(row | fields) + "\n" for row in rows))
    worst = max(rows, key=lambda row: row["spill_store_bytes"])
    print(f"wrote {len(rows)} kernels to {out}; most spilled: {json.dumps(worst)}")
    if worst["spill_store_bytes"] > SPILL_LIMIT:
        raise common.UsageError(
            f"no kernel may spill more than {SPILL_LIMIT} bytes: got "
            f"{worst['spill_store_bytes']}; change the tiling of that kernel"
        )


if __name__ == "__main__":
    common.run(main)
