"""What `generate` runs, with the most likely token each time, as two pure functions to compile.

For programs that are measured, counted or compiled ahead of time; a test compares their tokens with
those of `generate`.
"""

import jax
import jax.numpy as jnp

from longctx_jax.models.decoder import Decoder

PREFILL_LEN = 512  # tokens a call, the default of generate


def prefill(model: Decoder, variables, tokens: jax.Array, cache):
    """Returns the logits [batch, vocab] after the last token, and the cache."""
    piece = min(PREFILL_LEN, tokens.shape[1])
    n_before = (tokens.shape[1] - 1) // piece  # pieces whose outputs nobody wants
    pieces = tokens[:, : n_before * piece].reshape(tokens.shape[0], n_before, piece)

    def step(cache, tokens):
        return model.hidden(variables, tokens, cache, outputs="none").cache, None

    cache, _ = jax.lax.scan(step, cache, jnp.moveaxis(pieces, 1, 0))
    out = model.hidden(variables, tokens[:, n_before * piece :], cache, outputs="last")
    return (out.hidden[:, 0] @ model.unembedding(variables)).astype(jnp.float32), out.cache


def token_loop(model: Decoder, n_new: int, variables, logits: jax.Array, cache):
    """Returns n_new most likely tokens [batch, n_new], each fed back, and the cache."""

    def step(carry, _):
        logits, cache = carry
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        out = model.apply(variables, token[:, None], cache)
        return (out.logits[:, 0].astype(jnp.float32), out.cache), token

    (_, cache), tokens = jax.lax.scan(step, (logits, cache), length=n_new)
    return tokens.T, cache
