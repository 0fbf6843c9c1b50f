"""Cross-entropy in float32, summed over tokens, with or without chunking of the logits.

Sums, not means: micro-batches and processes add up exactly, and one division by the token count
happens where the count is known. Not here: label smoothing, which no scheme of this project uses.
"""

import math

import jax
import jax.numpy as jnp

from longctx_jax.ops.checked import checked
from longctx_jax.typing import Array, Float, Int

NATS_PER_BIT = math.log(2.0)


@checked
def token_nll(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Returns -log softmax(logits)[target] a token, nats, float32 (float64 for float64 logits).

    NaN where the target is no token's id.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    places = jnp.where(targets < 0, logits.shape[-1], targets)  # else counted from the end
    picked = jnp.take_along_axis(
        logits, places[..., None], axis=-1, mode="fill", fill_value=jnp.nan
    )
    return jax.nn.logsumexp(logits, axis=-1) - picked[..., 0]


@checked
def weighted(x: Float[Array, "*batch"], weights: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Returns x * weights, and 0 where a weight is 0 whatever x is: inf and NaN do not count."""
    return jnp.where(weights == 0, 0, x * weights.astype(x.dtype))


@checked
def chunked_token_nll(
    hidden: Float[Array, "batch seq model"],
    unembedding: Float[Array, "model vocab"],
    targets: Int[Array, "batch seq"],
    *,
    chunk_len: int,
    weights: Float[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq"]:
    """Returns token_nll(hidden @ unembedding, targets) with the logits of one chunk at a time.

    Weighted, if there are weights: a token of weight 0 gives 0 and gets no gradient, whatever its
    target and activations are.

    The backward pass recomputes each chunk's logits, so neither pass holds more than
    batch * chunk_len * vocab of them.

    Args:
        hidden: activations after the last norm, in the dtype of the matrix product.
        unembedding: output matrix, in the same dtype.
        targets: token ids.
        chunk_len: positions of the sequence a chunk; 0 = all at once. Need not divide seq.
        weights: what a token's loss counts; None = 1.

    Cost: 2 batch seq model vocab flops forward, three times that again backward.
    """
    if weights is not None:
        # Chosen before the logits, not only after: 0 times the derivative of a NaN is NaN.
        hidden = jnp.where(weights[..., None] == 0, 0, hidden)
        targets = jnp.where(weights == 0, 0, targets)
        unweighted = chunked_token_nll(hidden, unembedding, targets, chunk_len=chunk_len)
        return weighted(unweighted, weights)

    def chunk_nll(hidden, targets):
        logits = jnp.einsum(
            "btd,dz->btz", hidden, unembedding, preferred_element_type=_accumulator(hidden)
        )
        return token_nll(logits, targets)

    batch, seq, model = hidden.shape
    if chunk_len <= 0 or chunk_len >= seq:
        return chunk_nll(hidden, targets)
    chunk_nll = jax.checkpoint(chunk_nll)
    n_full = seq // chunk_len
    head = n_full * chunk_len
    chunks = (
        jnp.moveaxis(hidden[:, :head].reshape(batch, n_full, chunk_len, model), 1, 0),
        jnp.moveaxis(targets[:, :head].reshape(batch, n_full, chunk_len), 1, 0),
    )
    nll = jax.lax.map(lambda c: chunk_nll(*c), chunks)
    nll = jnp.moveaxis(nll, 0, 1).reshape(batch, head)
    if head == seq:
        return nll
    return jnp.concatenate([nll, chunk_nll(hidden[:, head:], targets[:, head:])], axis=1)


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Returns total nats over raw text bytes, in bits.

    Raises:
        ValueError: if there is no byte.
    """
    if not n_bytes > 0:
        raise ValueError(
            f"bits per byte need text: got {n_bytes} bytes; evaluate a text that is not empty"
        )
    return nats / NATS_PER_BIT / n_bytes


def _accumulator(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
