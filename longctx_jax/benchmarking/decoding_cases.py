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
from longctx_jax.decoding import cast_weights
from longctx_jax.decoding.greedy import prefill, token_loop
from longctx_jax.models.decoder import Decoder


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
        weights = cast_weights(model, variables())  # as generate does, once
        return weights, jnp.asarray(tokens), model.init_cache(batch_size, context_len + n_new)

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
