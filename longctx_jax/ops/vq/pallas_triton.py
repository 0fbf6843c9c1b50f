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
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from longctx_jax.ops.products import accumulator
from longctx_jax.ops.vq.blocks import Blocks, Constants, Rules
from longctx_jax.ops.vq.pallas_triton_keys import key_value_gradients, mean_gradient
from longctx_jax.ops.vq.pallas_triton_queries import forward, query_gradient
from longctx_jax.ops.vq.pallas_triton_tiles import MIN_WIDTH, Setup, Sizes, Tiling, pad_columns
from longctx_jax.typing import DType

TF32_PRECISIONS = ("default", "fastest", "tensorfloat32", "bfloat16", "TF32_TF32_F32")
MAX_KEY_WIDTH = {"bfloat16": 256, "float32": 128}
KERNELS = ("forward", "query_gradient", "key_gradient", "value_gradient", "both", "mean_gradient")
OF_TABLES = ("codebook", "mean", "log_count", "table_document")


def tiling(kernel: str, d_key: int, d_value: int, dtype: DType, has_bias: bool) -> Tiling:
    """Returns the tiling of one of `KERNELS` for these padded widths."""
    del kernel, d_key, dtype, has_bias
    return Tiling(64, 64, min(64, d_value), 4, 2)


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


def _device_unsupported(facts: Any) -> str:
    if facts.platform != "gpu":
        return f"a GPU kernel, and jax runs on {facts.platform}"
    if facts.dtype not in ("float32", "bfloat16"):
        return f"takes float32 or bfloat16, not {facts.dtype}"
    if not re.fullmatch(r"([89]|\d\d)\.\d|", facts.capability):
        return f"needs compute capability 8.0 or more, not {facts.capability}"
    return ""


def attend_blocks(
    rules: Rules, blocks: Blocks, constants: Constants, *, interpret: bool = False
) -> jax.Array:
    """Returns what `blocks.attend_blocks` returns, with the same gradients.

    Cost: see `forward`, `query_gradient`, `key_value_gradients`, `mean_gradient`; memory beside
    inputs and outputs: 8 bytes a query and head, the means in the dtype of the values.
    """
    return _attend(rules, interpret, tuple(blocks), tuple(constants))
