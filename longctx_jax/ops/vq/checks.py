"""What the arguments of VQ attention must fit together to be."""

import numpy as np
from jax.core import Tracer


def require_codebook(vectors: tuple[int, ...], codebook: tuple[int, ...]) -> None:
    """Raises ValueError unless there is a codebook for each head of the vectors."""
    if (codebook[0], codebook[2]) != tuple(vectors) or codebook[1] < 1:
        raise ValueError(
            "the codebook must be [heads, codes, key] of the vectors' heads and width "
            f"{tuple(vectors)}: got {tuple(codebook)}; one codebook a key head"
        )


def require_documents(documents, shape: tuple[int, int]) -> None:
    """Raises unless they are one id a token, and none negative where the values are known."""
    if documents is None:
        return
    if documents.shape != shape:
        raise ValueError(
            f"vq_attention: documents must be [batch, seq] = {shape}: got {documents.shape}"
        )
    if not isinstance(documents, Tracer) and np.any(np.asarray(documents) < 0):
        raise ValueError(
            f"vq_attention: documents must not be negative: got {int(np.min(documents))}; give "
            "padding a document of its own"
        )


def require_shapes(query, key, value, codebook, state, codes, relative_bias, window_len) -> None:
    """Raises ValueError unless arrays, state and window fit together."""
    require_codebook(key.shape[2:], codebook.shape)
    if query.shape[1] == 0:
        raise ValueError("vq_attention: needs a token: got a sequence of length 0")
    tokens = {"key": key, "value": value, "codes": codes, "relative_bias": relative_bias}
    for name, array in tokens.items():
        if array is not None and array.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"vq_attention: {name} must have the batch and tokens of query, {query.shape[:2]}: "
                f"got {array.shape}"
            )
    if value.shape[2] != key.shape[2]:
        raise ValueError(
            f"vq_attention: value must have the heads of key, {key.shape[2]}: got {value.shape}"
        )
    if codes is not None and codes.shape[2] != key.shape[2]:
        raise ValueError(
            f"vq_attention: codes must have the heads of key, {key.shape[2]}: got {codes.shape}"
        )
    if relative_bias is not None and relative_bias.shape[2] != query.shape[2]:
        raise ValueError(
            f"vq_attention: relative_bias must have the heads of query, {query.shape[2]}: got "
            f"{relative_bias.shape}"
        )
    if query.shape[2] % key.shape[2]:
        raise ValueError(
            f"vq_attention: query heads must be a multiple of key heads: got {query.shape[2]} and "
            f"{key.shape[2]}; set config.model.n_kv_heads to a divisor of config.model.n_heads"
        )
    if window_len < 1:
        raise ValueError(
            f"vq_attention: window_len must be at least 1: got {window_len}; set "
            "config.model.vq.window_len"
        )
    if relative_bias is not None and relative_bias.shape[-1] > window_len + 1:
        raise ValueError(
            "vq_attention: relative_bias must list distances 0 .. window_len at most: got "
            f"{relative_bias.shape[-1]} with window_len={window_len}; shorten it or widen "
            "the window"
        )
    if state is None:
        return
    batch, kv_heads = query.shape[0], key.shape[2]
    wanted = {
        "key": (batch, window_len, kv_heads, key.shape[-1]),
        "value": (batch, window_len, kv_heads, value.shape[-1]),
        "table.mean": (batch, kv_heads, codebook.shape[1], value.shape[-1]),
    }
    given = {"key": state.key, "value": state.value, "table.mean": state.table.mean}
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ValueError(
                f"vq_attention: state.{name} must be {shape}: got {given[name].shape}; make the "
                "state with init_vq_state of the same sizes"
            )
