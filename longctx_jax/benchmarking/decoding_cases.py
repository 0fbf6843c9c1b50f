"""Decoding as cases to time: the pass over a prompt, and the compiled loop over tokens.

Both are what `decoding.generate` runs, with greedy draws: the prompt in pieces of PREFILL_LEN
tokens, then one compiled loop of one-token calls. A test compares tokens with generate.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.benchmarking.timing import Case
from longctx_jax.models.base import Decoder

PREFILL_LEN = 512  # tokens a call, the default of generate


def cache_bytes(model: Decoder, batch_size: int, max_len: int) -> int:
    """Returns the bytes of the whole model cache."""
    leaves = jax.eval_shape(lambda: jax.tree.leaves(model.init_cache(batch_size, max_len)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def prefill_case(
    model: Decoder,
    batch_size: int,
    context_len: int,
    n_new: int,
    make_variables: Callable[[], Any] | None = None,
) -> Case:
    """Returns the pass over a prompt: (variables, tokens, empty cache) -> (logits, cache)."""
    variables = make_variables or functools.cache(lambda: model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)

    def make_inputs(last):
        del last
        shape = (batch_size, context_len)
        tokens = rng.integers(0, model.config.vocab_size, shape, np.int32)
        return variables(), jnp.asarray(tokens), model.init_cache(batch_size, context_len + n_new)

    return Case(jax.jit(functools.partial(prefill, model.exact), donate_argnums=2), make_inputs)


def loop_case(prefilled: Case, model: Decoder, n_new: int) -> Case:
    """Returns the loop of n_new one-token calls that continues the prefill of `prefilled`.

    The cache is not donated, so a run holds it twice: every run continues the same prompt.
    """

    @functools.cache
    def start():
        variables, *rest = prefilled.make_inputs(None)
        return variables, *prefilled.function(variables, *rest)

    return Case(jax.jit(functools.partial(token_loop, model, n_new)), lambda _: start())


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
