"""Classes of calls that our GPU kernels take, compiled for an H200 without one: registers, spills.

A file a family of kernels: `cases()` lists the classes, `compile_case(case, log)` returns a row a
kernel of one. What it needs: `deviceless.py`.
"""

import collections
import pathlib
from collections.abc import Mapping
from typing import Any

from longctx_jax.benchmarking.kernel_classes import decay, flash_decoding, vq
from longctx_jax.benchmarking.rows import Row, make

SPILL_LIMIT = 64  # bytes of registers that a kernel which "auto" takes may spill
FAMILIES = {"decay": decay, "vq": vq, "flash_decoding": flash_decoding}
MEASURED = ("tiling", "registers", "spill_store_bytes", "spill_load_bytes", "stack_bytes")


def kernel_rows(family: str, case: Mapping[str, Any], log: pathlib.Path, fields: Any) -> list[Row]:
    """Returns a row a kernel of one class of calls.

    Args:
        family: of FAMILIES.
        case: of its `cases()`.
        log: that the compiler writes.
        fields: of the environment.
    """
    rows, numbers = [], collections.Counter()  # of the same kernel in one class of calls
    for row in FAMILIES[family].compile_case(dict(case), log):
        measured = {name: row.pop(name) for name in MEASURED if name in row}
        about = {"suite": "registers", "kernels": family, **row, "number": numbers[row["kernel"]]}
        numbers[row["kernel"]] += 1
        rows.append(make(about, measured, fields))
    return rows
