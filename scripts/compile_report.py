"""Compiles GPU kernels for an H200 without one: python -m scripts.compile_report --kernels=decay.

Writes a JSON line a kernel with its registers and spills, and fails if one that "auto" may take
spills more than 64 bytes. What it needs: `longctx_jax/benchmarking/deviceless.py`.
"""

import collections
import dataclasses
import functools
import itertools
import json
import pathlib
import sys
from typing import Any

from absl import flags

from scripts import common

_KERNELS = flags.DEFINE_enum(
    "kernels", "decay", ["decay", "vq", "flash_decoding"], "Whose kernels to compile."
)
_OUT = flags.DEFINE_string("out", "", "JSON-lines file; empty = one in results/.")
SPILL_LIMIT = 64  # bytes
MEASURED = ("tiling", "registers", "spill_store_bytes", "spill_load_bytes", "stack_bytes")
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
VQ_WIDTHS = {  # dtype -> (key, value) widths: heads of attention, and gated units
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


def decay_cases() -> list[dict[str, Any]]:
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


def compile_decay(case: dict[str, Any], log: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of one class of calls of decay attention."""
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


def vq_cases() -> list[dict[str, Any]]:
    """Returns the classes of calls that the kernels of vector-quantised attention take.

    Block 512 fills tiles, 500 does not; 64 and 16 have shorter tiles of queries.
    """
    cases = [
        {"dtype": dtype, "d_key": d_key, "d_value": d_value, "has_bias": has_bias, "block": block}
        for has_bias, block in ((True, 512), (True, 500), (True, 64), (False, 512))
        for dtype, widths in VQ_WIDTHS.items()
        for d_key, d_value in widths
    ]
    rules = {"use_table": True, "grad_through_cache": True}
    cases = [case | rules for case in cases]
    usual = cases[1]
    cases += [usual | {"use_table": False}, usual | {"grad_through_cache": False}]
    cases += [usual | {"block": 16}]
    shape = {"blocks": 8, "batch": 1, "kv_heads": 4, "group": 2, "window_len": 512, "codes": 512}
    return [{"backend": "pallas_triton", **case, **shape} for case in cases]


def compile_vq(case: dict[str, Any], log: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of one class of calls: attention and its gradients, search, tables."""
    import jax
    import jax.numpy as jnp

    from longctx_jax.benchmarking import deviceless
    from longctx_jax.ops.vq import pallas_triton
    from longctx_jax.ops.vq.blocks import Blocks, Constants, Rules
    from longctx_jax.ops.vq.table import Table

    n, batch, heads, group = (case[name] for name in ("blocks", "batch", "kv_heads", "group"))
    block, window, codes = case["block"], case["window_len"], case["codes"]
    d_key, d_value = case["d_key"], case["d_value"]
    before = -(-window // block) * block

    def array(*shape, dtype=case["dtype"]):
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
    from longctx_jax.ops.vq import pallas_triton, pallas_triton_search, pallas_triton_table

    if kernel == "vq_search_codes":
        return dataclasses.asdict(pallas_triton_search.TILING)
    if kernel == "vq_tables_before_blocks":
        return dataclasses.asdict(pallas_triton_table.tiling(case["d_value"], case["dtype"]))
    name = kernel.removeprefix("vq_attention_")
    widths = case["d_key"], case["d_value"]
    return dataclasses.asdict(pallas_triton.tiling(name, *widths, case["dtype"], case["block"]))


def flash_decoding_cases() -> list[dict[str, Any]]:
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


def compile_flash_decoding(case: dict[str, Any], log: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the row of one class of calls."""
    import jax
    import jax.numpy as jnp

    from longctx_jax.benchmarking import deviceless
    from longctx_jax.ops import flash_decoding
    from longctx_jax.ops.position import DistanceBias

    def array(*shape, dtype=case["dtype"]):
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


def main(arguments: list[str]) -> None:
    """Compiles, writes, prints the worst."""
    del arguments
    from longctx_jax.benchmarking import deviceless

    log = deviceless.prepare_environment()
    import jax

    from longctx_jax.benchmarking import rows as rows_of

    cases, compile_case = {
        "decay": (decay_cases, compile_decay),
        "vq": (vq_cases, compile_vq),
        "flash_decoding": (flash_decoding_cases, compile_flash_decoding),
    }[_KERNELS.value]
    out = pathlib.Path(_OUT.value or f"results/{_KERNELS.value}_h200_registers.jsonl")
    rows: list[dict[str, Any]] = []
    for number, case in enumerate(every := cases()):
        numbers = collections.Counter()  # of the same kernel in one class of calls
        for row in compile_case(case, log):
            measured = {name: row.pop(name) for name in MEASURED if name in row}
            about = {"suite": "registers", "kernels": _KERNELS.value, **row}
            about["number"] = numbers[row["kernel"]]
            numbers[row["kernel"]] += 1
            rows.append(rows_of.make(about, measured))
        print(f"\r{number + 1} of {len(every)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    fields = {"device": "NVIDIA H200 (compiled without one)", "jax_version": jax.__version__}
    fields["command"] = f"python -m scripts.compile_report --kernels={_KERNELS.value}"
    out.unlink(missing_ok=True)
    rows_of.append(out, [row | {"environment": fields} for row in rows])
    worst = max(map(rows_of.flat, rows), key=lambda row: row["spill_store_bytes"])
    print(f"wrote {len(rows)} kernels to {out}; most spilled: {json.dumps(worst)}")
    if worst["spill_store_bytes"] > SPILL_LIMIT:
        raise common.UsageError(
            f"no kernel may spill more than {SPILL_LIMIT} bytes: got "
            f"{worst['spill_store_bytes']}; change the tiling of that kernel"
        )


if __name__ == "__main__":
    common.run(main)
