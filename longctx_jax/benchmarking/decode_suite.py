"""The suite `decode`, part "mixers": prefill and the compiled token loop by context and batch.

Both functions are what `decoding.generate` runs, with greedy draws: the prompt in pieces of
PREFILL_LEN tokens, then one compiled loop of one-token calls. A test compares tokens with generate.
Not here: the parts "stacks" (`stack_suite.py`), "initial" (`initial_suite.py`) and "attention"
(`cache_suite.py`).
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.accounting import flops
from longctx_jax.benchmarking.suites import (
    Limits,
    base_model,
    shape_fields,
    speed_fields,
    variant,
)
from longctx_jax.benchmarking.timing import Case, Row
from longctx_jax.decoding.greedy import prefill, token_loop
from longctx_jax.models.decoder import Decoder

PARTS = ("mixers", "stacks", "initial", "attention")
KINDS = ("softmax", "sliding", "decay")
CONTEXT_LENS = (256, 1024, 4096, 16384)
CPU_CONTEXT_LENS = (256, 1024, 4096)  # longer prefills take minutes a run there
BATCH_SIZES = (1, 8)


def decode_rows(config: Any, limits: Limits) -> Iterator[Row]:
    """Yields a prefill row and a token-loop row a (context length, batch size, mixer)."""
    base = base_model(config, limits)
    lengths = CPU_CONTEXT_LENS if jax.default_backend() == "cpu" else CONTEXT_LENS
    lengths = limits.lengths or ((16, 32) if limits.is_quick else lengths)
    n_new = 4 if limits.is_quick else 64
    models = {kind: variant(base, (kind,)) for kind in KINDS}
    for context_len, batch_size in itertools.product(lengths, BATCH_SIZES):
        prefills = {k: prefill_case(m, batch_size, context_len, n_new) for k, m in models.items()}
        prefill = limits.measure(prefills)
        loop = limits.measure({k: loop_case(prefills[k], m, n_new) for k, m in models.items()})
        for kind, model in models.items():
            fields = {
                "suite": "decode",
                "part": "mixers",
                "pattern": (kind,),
                "context_len": context_len,
                "n_new_tokens": n_new,
                **shape_fields(model.config, batch_size, context_len),
                "cache_bytes": cache_bytes(model, batch_size, context_len + n_new),
            }
            row = prefill[kind][0]
            per_token = flops.forward_flops_per_token(model.config, context_len)
            speed = speed_fields(row, batch_size * context_len, per_token)
            yield {"name": f"prefill {kind}", "pass": "prefill", **fields, **row, **speed}
            row = loop[kind][0]
            middle = context_len + n_new // 2
            per_token = flops.forward_flops_per_token(model.config, 1, n_past=middle)
            speed = speed_fields(row, batch_size * n_new, per_token)
            speed["token_ms"] = round(row["median_ms"] / n_new, 5)
            yield {"name": f"loop {kind}", "pass": "loop", **fields, **row, **speed}


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
