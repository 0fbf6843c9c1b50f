"""Part "initial" of the suite `decode`: attention to embeddings beside keys and values, by context.

Every variant has the same layers. A prompt is random tokens; keys and values of the transformers
are random too, since what a token costs does not depend on them, and a dense prefill of a long
prompt would take longer than everything else. Prefill itself is measured up to MAX_PREFILL tokens.
Beside each time stands its floor: every layer reads its cache, or the memory that all share, once.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.accounting import flops
from longctx_jax.accounting.caches import cache_bytes
from longctx_jax.benchmarking import roofline
from longctx_jax.benchmarking.decode.stacks import make_variables, weight_bytes
from longctx_jax.benchmarking.model_cases import shape_fields
from longctx_jax.benchmarking.ratios import speed_ratio
from longctx_jax.benchmarking.rows import Fields, Row, make, within
from longctx_jax.benchmarking.timing import Case, Limits, Measured
from longctx_jax.decoding import cast_weights
from longctx_jax.decoding.greedy import prefill, token_loop
from longctx_jax.models import build_model
from longctx_jax.models.decoder import Decoder
from longctx_jax.models.inattention import cache as initial_cache
from longctx_jax.nn.kv_cache import KVCache

NEAR = {"memory_position": "none", "score_position": "near"}
VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"n_kv_heads": "quarter"},
    "mqa": {"n_kv_heads": 1},
    "sliding 4096": {"pattern": ("sliding",), "sliding": {"window_len": 4096}},
    "keys and values": {"inattention": {"cache": "kv"}},
    "embeddings": {"inattention": {"cache": "embedding"}},
    "embeddings, narrow": {"inattention": {"cache": "embedding"}, "d_memory": "quarter"},
    "ids, sinusoids": {"inattention": {"cache": "ids"}},
    "ids": {"inattention": NEAR | {"cache": "ids"}},
    "counts": {"inattention": NEAR | {"cache": "counts"}},
    "counts, alibi": {
        "inattention": {"memory_position": "none", "score_position": "alibi", "cache": "counts"}
    },
}
BASELINE = "mha"
SMALL = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_ff": 32}
ON_CPU = {"n_layers": 4, "d_model": 128, "n_heads": 4, "d_ff": 352}
CPU_CONTEXT_LENS = (1024, 8192, 65_536, 2**20)
CONTEXT_LENS = (4096, 32_768, 131_072, 2**20)
MAX_PREFILL = {"cpu": 4096}
MAX_PREFILL_ELSEWHERE = 131_072
MAX_CACHE_BYTES = {"cpu": 2**31}
MAX_CACHE_BYTES_ELSEWHERE = 2**36


def initial_rows(limits: Limits, shapes: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Yields a row of the token loop and one of the prefill a (shape, context, variant).

    Args:
        limits: how long to measure.
        shapes: names and sizes (fields of config.model) of models to measure on a GPU.
    """
    contexts, dtype = CONTEXT_LENS, "bfloat16"
    if limits.is_quick or jax.default_backend() == "cpu":
        shapes = {"tiny": SMALL} if limits.is_quick else {"small": ON_CPU}
        contexts, dtype = (32,) if limits.is_quick else CPU_CONTEXT_LENS, "float32"
    for shape, fields in shapes.items():
        models = make_models(fields, dtype)
        for context_len in limits.lengths or contexts:
            for measure in (_prefills, _loops):
                yield from within(measure(models, context_len, limits), shape=shape)


def make_models(fields: Mapping[str, Any], dtype: str) -> dict[str, Decoder]:
    """Returns every variant with these sizes."""
    models = {}
    for name, changes in VARIANTS.items():
        own = {"vocab_size": 256, **fields, **changes, "dtype": dtype}
        if "inattention" in own:
            own["name"] = "inattention"
        if own.get("n_kv_heads") == "quarter":
            own["n_kv_heads"] = max(1, own["n_heads"] // 4)
        if own.pop("d_memory", ""):
            own["inattention"] = {**own["inattention"], "d_memory": own["d_model"] // 4}
        models[name] = build_model(own)
    return models


def filled_cache(model: Decoder, context_len: int, max_len: int) -> Any:
    """Returns a cache of one stream that has taken in context_len tokens, at random."""
    rng = np.random.default_rng(0)

    def fill(cache):
        if not isinstance(cache, KVCache):
            return cache
        capacity = cache.capacity
        slots = np.arange(capacity)
        positions = context_len - 1 - (context_len - 1 - slots) % capacity
        return KVCache(
            jnp.asarray(rng.normal(size=cache.key.shape), cache.key.dtype),
            jnp.asarray(rng.normal(size=cache.value.shape), cache.value.dtype),
            jnp.broadcast_to(jnp.asarray(positions, jnp.int32), cache.slot_positions.shape),
            cache.slot_documents,
            jnp.full_like(cache.position, context_len),
        )

    empty = model.init_cache(1, max_len)
    tokens = jnp.asarray(rng.integers(0, model.config.vocab_size, (1, context_len), np.int32))
    if model.config.name == "inattention" and not isinstance(empty.layers, KVCache):
        return take_in(model, make_variables(model), tokens, empty)
    layers = jax.tree.map(fill, empty.layers, is_leaf=lambda x: isinstance(x, KVCache))
    cache = dataclasses.replace(empty, layers=layers)
    if model.config.name == "inattention":
        place = dataclasses.replace(
            empty.carried.place, position=jnp.full((1,), context_len, jnp.int32)
        )
        cache = dataclasses.replace(cache, carried=dataclasses.replace(empty.carried, place=place))
    return cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def take_in(model: Decoder, variables, tokens, cache):
    """Returns the cache after tokens whose outputs nobody wants."""
    return model.hidden(variables, tokens, cache, outputs="none").cache


def read_bytes(model: Decoder, max_len: int) -> int:
    """Returns what a token must read of its cache: what layers share, in every layer."""
    n_bytes = cache_bytes(model, 1, max_len)
    if model.config.name != "inattention":
        return n_bytes
    kind = initial_cache.choose_cache(model.config, max_len)
    return n_bytes if kind == "kv" else n_bytes * model.config.n_layers


def step_flops(model: Decoder, n_past: int) -> float:
    """Returns the products of one token after n_past, in the form that its cache asks for.

    Rows of width R instead of keys: 2 H n (R + d_memory), and 2 H d_memory (K + V) for the
    projections of queries and results. Ids and counts: rows of V types instead of n tokens.
    """
    config = model.config
    if config.name != "inattention":
        return flops.forward_flops_per_token(config, 1, n_past=n_past)
    plain = flops.forward_flops_per_token(config, 1, n_past=0)
    heads, widths = config.n_heads, config.d_key + config.d_value
    kind = initial_cache.choose_cache(config, n_past)
    memory, row = (
        initial_cache.d_memory(config),
        initial_cache.d_memory(config) + initial_cache.d_rotary(config),
    )
    if kind == "kv":
        return flops.forward_flops_per_token(config, 1, n_past=n_past)
    is_table = config.inattention.memory_position == "none" and kind != "embedding"
    if is_table:
        near = config.inattention.n_exact if config.inattention.score_position == "near" else 0
        n_past = config.vocab_size + (near if kind == "counts" else 0)
    return plain + config.n_layers * 2 * heads * (n_past * (row + memory) + memory * widths)


def _loops(models: Mapping[str, Decoder], context_len: int, limits: Limits) -> Iterator[Row]:
    n_new = 4 if limits.is_quick or context_len > 100_000 else 32
    max_len = context_len + n_new
    cases, skipped = {}, []
    most = MAX_CACHE_BYTES.get(jax.default_backend(), MAX_CACHE_BYTES_ELSEWHERE)
    for name, model in models.items():
        if cache_bytes(model, 1, max_len) > most:
            skipped.append(name)
            continue

        @functools.cache
        def start(model=model):
            logits = jnp.zeros((1, model.config.vocab_size))
            weights = cast_weights(model, make_variables(model))  # as generate does, once
            return weights, logits, filled_cache(model, context_len, max_len)

        loop = jax.jit(functools.partial(token_loop, model, n_new))
        cases[name] = Case(loop, lambda _, start=start: start())
    measured = limits.measure(cases)
    for name, (row, _) in measured.items():
        model = models[name]
        n_bytes = n_new * (weight_bytes(model) + read_bytes(model, max_len))
        n_flops = round(n_new * step_flops(model, context_len))
        top = roofline.ceiling(
            jax.devices()[0].device_kind, model.config.dtype, is_quick=limits.is_quick
        )
        floor = roofline.floor_fields(n_bytes, n_flops, n_new, row["median_ms"], top)
        token = {"token_ms": round(row["median_ms"] / n_new, 5)}
        about = {**_about(name, model, context_len), "pass": "loop", "n_new_tokens": n_new}
        yield make(about, _sizes(model, max_len) | row | floor | token)
    for name in skipped:
        sizes = _sizes(models[name], max_len)
        about = {**_about(name, models[name], context_len), "pass": "loop", "n_new_tokens": n_new}
        yield make(about, sizes | {"skipped": f"a cache of {sizes['cache_bytes']} bytes"})
    yield from _ratios("loop", context_len, measured)


def _prefills(models: Mapping[str, Decoder], context_len: int, limits: Limits) -> Iterator[Row]:
    """Prompts up to the last token's logits."""
    longest = MAX_PREFILL.get(jax.default_backend(), MAX_PREFILL_ELSEWHERE)
    cases = {}
    for name, model in models.items():
        if context_len > longest and (model.config.name != "inattention" or "keys" in name):
            continue

        def make_inputs(_, model=model):
            rng = np.random.default_rng(0)
            tokens = rng.integers(0, model.config.vocab_size, (1, context_len), np.int32)
            cache = model.init_cache(1, context_len)
            return make_variables(model), jnp.asarray(tokens), cache

        function = jax.jit(functools.partial(prefill, model), donate_argnums=2)
        cases[name] = Case(function, make_inputs)
    measured = limits.measure(cases)
    for name, (row, _) in measured.items():
        speed = {"tokens_per_s": round(1e3 * context_len / row["median_ms"], 2)}
        about = {**_about(name, models[name], context_len), "pass": "prefill"}
        yield make(about, _sizes(models[name], context_len) | row | speed)
    yield from _ratios("prefill", context_len, measured)


def _about(name: str, model: Decoder, context_len: int) -> Fields:
    about = {"name": f"initial {name}", "variant": name, "pattern": (name,)}
    return about | {"context_len": context_len, **shape_fields(model.config, 1, context_len)}


def _sizes(model: Decoder, max_len: int) -> Fields:
    kind = "kv"
    if model.config.name == "inattention":
        kind = initial_cache.choose_cache(model.config, max_len)
    sizes = {"cache_bytes": cache_bytes(model, 1, max_len), "weight_bytes": weight_bytes(model)}
    return {"cache": kind, **sizes}


def _ratios(what: str, context_len: int, measured: Measured) -> Iterator[Row]:
    """Yields how many times as fast each variant is as the baseline, if that was measured."""
    for name in measured if BASELINE in measured else ():
        if name != BASELINE:
            about = {"name": f"ratio initial {what} {name} / {BASELINE}", "variant": name}
            about |= {"baseline": BASELINE, "pass": what, "context_len": context_len}
            about["batch_size"] = 1
            yield make(about, speed_ratio(measured[name][1], measured[BASELINE][1]))
