"""Exact causal softmax attention, whole or over some of the keys; partial results merge exactly.

| what | where |
| --- | --- |
| `attention`, `attention_partial`, the choice of a form | `select.py` |
| dense (the definition), banded, blockwise, cuDNN | `forms.py` |
| visibility, merging | `partial.py` |

Not here: rotating queries and keys (`ops/position.py`), caches (`nn/kv_cache.py`).
"""

from longctx_jax.ops.attention.forms import KEY_BLOCK_LEN, MIN_BAND_LEN
from longctx_jax.ops.attention.partial import (
    NEVER,
    Keys,
    Partial,
    attention_to_self,
    empty_partial,
    is_visible,
    merge_partial_attention,
)
from longctx_jax.ops.attention.select import attention, attention_partial, prefers_dense

__all__ = [
    "KEY_BLOCK_LEN",
    "MIN_BAND_LEN",
    "NEVER",
    "Keys",
    "Partial",
    "attention",
    "attention_partial",
    "attention_to_self",
    "empty_partial",
    "is_visible",
    "merge_partial_attention",
    "prefers_dense",
]
