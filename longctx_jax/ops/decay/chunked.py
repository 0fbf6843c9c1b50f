"""The chunked form of Lightning Attention-2: one walk over chunks forwards, walks for gradients.

The walk is that of `block.py`; here its reverse-mode rule is the operator itself (`linear_vjp.py`),
so that neither scores nor states are kept for the backward pass.

Source: Qin et al. (2024), arXiv 2401.04658.
"""

import functools

from longctx_jax.ops.decay.block import walk_blocks
from longctx_jax.ops.decay.linear_vjp import differentiable
from longctx_jax.ops.decay.two_pass import CHUNK_LEN
from longctx_jax.typing import Array, Bool, Float


def decay_attention_chunked(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq #heads"] | None = None,
    scale: float,
    chunk_len: int = CHUNK_LEN,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`, for any seq (the last chunk may be short).

    Cost: 2 batch heads seq (chunk_len (key + value) + 2 key value) flops, three times that
    backwards; seq / chunk_len sequential steps; memory of the backward pass: the inputs alone.
    """
    return _run(chunk_len)(query, key, value, log_decay, state, reset, scale)


@functools.cache
def _run(chunk_len: int):
    def walk(x, y, z, log_decay, state, *, out_dtype, **options):
        options["chunk_len"] = chunk_len
        out, last = walk_blocks(x, y, z, log_decay, state, out_dtype=out_dtype, **options)
        return out, last

    return differentiable(walk)
