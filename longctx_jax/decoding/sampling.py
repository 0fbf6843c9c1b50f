"""From logits to a token: temperature, top-k, nucleus."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from longctx_jax.typing import Array, Bool, Float, Int, PRNGKey

ROUNDING = 1e-6  # of sums of float32 probabilities: .5 + .3 reaches .8


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: logits are divided by it; 0 = the most likely token.
        top_k: keep the k most likely tokens, of equal ones the lowest ids; 0 = all.
        top_p: keep the smallest set of most likely tokens whose probability reaches p, to the
            rounding of float32; of equal ones the lowest ids; 1 = all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                "temperature must be a number that is not negative: got "
                f"{self.temperature}; 0 is greedy, 1 leaves the model's probabilities"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k must not be negative: got {self.top_k}; 0 keeps all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be in (0, 1]: got {self.top_p}; 1 keeps all tokens")


def filter_logits(
    logits: Float[Array, "batch vocab"], sampling: Sampling
) -> Float[Array, "batch vocab"]:
    """Returns logits / temperature with -inf for tokens that top-k or the nucleus drop.

    The nucleus is taken after temperature and top-k. At least one token always stays.
    """
    logits = logits.astype(jnp.float32) / max(sampling.temperature, 1e-6)
    vocab = logits.shape[-1]
    if 0 < sampling.top_k < vocab:
        _, kept = jax.lax.top_k(logits, sampling.top_k)  # the lowest ids of a tie come first
        logits = jnp.where(_is_among(kept, vocab), logits, -jnp.inf)
    if sampling.top_p < 1.0:
        order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
        probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs  # mass of the more likely tokens
        is_kept = before < sampling.top_p - ROUNDING
        is_kept = is_kept.at[..., 0].set(True)
        keep = jnp.take_along_axis(is_kept, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(keep, logits, -jnp.inf)
    return logits


def _is_among(ids: Int[Array, "batch k"], vocab: int) -> Bool[Array, "batch vocab"]:
    """Returns which ids of the vocabulary are among those of the row."""
    rows = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]
    return jnp.zeros((ids.shape[0], vocab), bool).at[rows, ids].set(True)


def sample(
    key: PRNGKey, logits: Float[Array, "batch vocab"], sampling: Sampling
) -> Int[Array, " batch"]:
    """Returns one token a row, int32."""
    if sampling.temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, filter_logits(logits, sampling)).astype(jnp.int32)
