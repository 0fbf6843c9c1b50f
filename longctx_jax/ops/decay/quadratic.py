"""The quadratic form on matrix units: one chunk that holds the whole sequence.

Unlike the reference it multiplies in the input's dtype: best for a sequence of one tile or so.
"""

from longctx_jax.ops.decay.two_pass import decay_attention_two_pass
from longctx_jax.typing import Array, Bool, Float


def decay_attention_quadratic(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq #heads"] | None = None,
    scale: float,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`.

    Cost: 2 batch heads seq^2 (key + value) flops; seq^2 scores a head in memory.
    """
    arrays = (query, key, value, log_decay, state)
    return decay_attention_two_pass(*arrays, reset=reset, scale=scale, chunk_len=query.shape[1])
