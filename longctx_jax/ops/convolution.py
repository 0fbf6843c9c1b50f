"""Short causal depthwise convolution along time: each channel mixes its last few tokens.

    y_t = sum_{j < width} kernel_j * x_{t-j}        terms of earlier documents are dropped

The local mixing that linear recurrences are given in practice (Mamba: Gu & Dao 2023, arXiv
2312.00752).
"""

import jax.numpy as jnp

from longctx_jax.ops.checked import checked
from longctx_jax.typing import Array, Float, Int


@checked
def short_convolution(
    x: Float[Array, "batch seq model"],
    kernel: Float[Array, "width model"],
    history: Float[Array, "batch past model"] | None = None,
    *,
    documents: Int[Array, "batch seq"] | None = None,
    history_documents: Int[Array, "batch past"] | None = None,
) -> tuple[Float[Array, "batch seq model"], Float[Array, "batch past model"]]:
    """Returns y and the last width - 1 inputs, which are the history of the next call.

    Args:
        kernel: row j weighs the token j places back.
        history: the width - 1 inputs before x, oldest first; None = zeros.
        documents: document of each token, None = all in one.
        history_documents: of the tokens in history, needed with documents and history.

    Cost: 2 batch seq width model flops.
    """
    batch, seq, model = x.shape
    past = kernel.shape[0] - 1
    if history is not None and history.shape[1] != past:
        raise ValueError(
            f"short_convolution: history must be the {past} inputs before x, one fewer than the "
            f"kernel has rows: got {history.shape[1]}; another number would shift time"
        )
    if history is not None and documents is not None and history_documents is None:
        raise ValueError(
            "short_convolution: documents need history_documents beside history: got None; pass "
            "the documents of the inputs in history"
        )
    if history is None:
        history = jnp.zeros((batch, past, model), x.dtype)
    padded = jnp.concatenate([history.astype(x.dtype), x], axis=1)
    if documents is not None:
        if history_documents is None:
            history_documents = jnp.broadcast_to(documents[:, :1], (batch, past))
        all_documents = jnp.concatenate([history_documents, documents], axis=1)
    y = jnp.zeros_like(x)
    for back in range(past + 1):
        first = past - back
        term = padded[:, first : first + seq] * kernel[back].astype(x.dtype)[None, None]
        if documents is not None and back:
            is_same = all_documents[:, first : first + seq] == documents
            term = jnp.where(is_same[..., None], term, 0)
        y += term
    return y, padded[:, seq:]
