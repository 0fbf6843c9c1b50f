"""Part "mixers" of the suite `decode`: prefill and the compiled token loop by context and batch."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax

from longctx_jax.accounting import flops
from longctx_jax.accounting.caches import cache_bytes
from longctx_jax.benchmarking.decoding_cases import loop_case, prefill_case
from longctx_jax.benchmarking.model_cases import (
    Mixers,
    base_model,
    shape_fields,
    speed_fields,
    variant,
    with_outside,
)
from longctx_jax.benchmarking.rows import Row, make
from longctx_jax.benchmarking.timing import Limits
from longctx_jax.nn.mixers import MIXERS

KINDS = ("softmax", "sliding", "decay")
CONTEXT_LENS = (256, 1024, 4096, 16384)
CPU_CONTEXT_LENS = (256, 1024, 4096)  # longer prefills take minutes a run there
BATCH_SIZES = (1, 8)


def mixer_rows(config: Any, limits: Limits, mixers: Mixers = MIXERS) -> Iterator[Row]:
    """Yields a prefill row and a token-loop row a (context length, batch size, mixer)."""
    base = base_model(config, limits, mixers)
    lengths = CPU_CONTEXT_LENS if jax.default_backend() == "cpu" else CONTEXT_LENS
    lengths = limits.lengths or ((16, 32) if limits.is_quick else lengths)
    n_new = 4 if limits.is_quick else 64
    models = {kind: variant(base, (kind,)) for kind in with_outside(KINDS, mixers)}
    for context_len, batch_size in itertools.product(lengths, BATCH_SIZES):
        prefills = {k: prefill_case(m, batch_size, context_len, n_new) for k, m in models.items()}
        prefill = limits.measure(prefills)
        loop = limits.measure({k: loop_case(prefills[k], m, n_new) for k, m in models.items()})
        for kind, model in models.items():
            about = {"pattern": (kind,), "context_len": context_len, "n_new_tokens": n_new}
            about |= shape_fields(model.config, batch_size, context_len)
            size = {"cache_bytes": cache_bytes(model, batch_size, context_len + n_new)}
            row = prefill[kind][0]
            per_token = flops.forward_flops_per_token(model.config, context_len)
            speed = speed_fields(row, batch_size * context_len, per_token)
            case = {"name": f"prefill {kind}", "pass": "prefill", **about}
            yield make(case, size | row | speed)
            row = loop[kind][0]
            middle = context_len + n_new // 2
            per_token = flops.forward_flops_per_token(model.config, 1, n_past=middle)
            speed = speed_fields(row, batch_size * n_new, per_token)
            speed["token_ms"] = round(row["median_ms"] / n_new, 5)
            yield make({"name": f"loop {kind}", "pass": "loop", **about}, size | row | speed)
