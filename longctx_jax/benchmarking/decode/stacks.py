"""Part "stacks" of the suite `decode`: the token loop of staggered stacks, and of dense models.

Every variant has the same layers, split into two stacks, and decodes the same number of tokens
after a prompt of the same length; all variants of a context and batch run in turns. Beside each
time stands its floor: the bytes a token must read (weights once if the lanes share them, the whole
cache) and its products, against the device's ceilings. Weights are in the dtype of matrix products.

Source of the question: Cutler et al. (2025), arXiv 2501.15665, which reports a simulated 33 %.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from longctx_jax.accounting import flops
from longctx_jax.accounting.caches import cache_bytes
from longctx_jax.benchmarking import roofline
from longctx_jax.benchmarking.decoding_cases import loop_case, prefill_case
from longctx_jax.benchmarking.model_cases import shape_fields
from longctx_jax.benchmarking.ratios import speed_ratio
from longctx_jax.benchmarking.rows import Row, make, within
from longctx_jax.benchmarking.timing import Limits
from longctx_jax.models import build_model
from longctx_jax.models.decoder import Decoder
from longctx_jax.nn.contract import Call

SHARED = {"share_weights": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "separate": {},
    "separate, rows as cache": {"cross_cache": "memory", "cross_position": "none"},
    "separate, window 128": {"cross_window": 128},
    "separate, window 1": {"cross_window": 1},
    "shared": SHARED,
    "shared, window 128": SHARED | {"cross_window": 128},
    "shared, window 1": SHARED | {"cross_window": 1},
    "shared, added": SHARED | {"handoff": "add"},
    "shared, recurrent": SHARED | {"recurrent": True},
    "shared, in turns": SHARED | {"decode": "sequential"},
    "loop": SHARED | {"handoff": "add", "stagger": False},
}
DENSE, HALF = "dense", "dense, half as deep"
BASELINES = (DENSE, "loop")  # of equal depth, one layer after the other
SMALL = {"n_layers": 4, "d_model": 16, "n_heads": 2, "d_ff": 32}
ON_CPU = {"n_layers": 12, "d_model": 256, "n_heads": 4, "d_ff": 704}
CPU_CONTEXT_LENS, CONTEXT_LENS = (256, 1024, 4096), (1024, 8192, 65_536)
CPU_BATCH_SIZES, BATCH_SIZES = (1, 8), (1, 8, 32, 128)
MAX_CACHE_BYTES = 64 * 2**30


def stack_rows(limits: Limits, shapes: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """Yields a row a (shape, context, batch, variant), and their ratios to the baselines.

    Args:
        limits: how long to measure.
        shapes: names and sizes (fields of config.model) of models to measure on a GPU.
    """
    platform = jax.default_backend()
    contexts, batches, dtype = CONTEXT_LENS, BATCH_SIZES, "bfloat16"
    if limits.is_quick or platform == "cpu":
        shapes = {"tiny": SMALL} if limits.is_quick else {"small": ON_CPU}
        contexts, batches, dtype = CPU_CONTEXT_LENS, CPU_BATCH_SIZES, "float32"
    if limits.is_quick:
        contexts, batches = (16,), (1, 2)
    n_new = 4 if limits.is_quick else 64
    for shape, fields in shapes.items():
        models = make_models(fields, dtype)
        for context_len in limits.lengths or contexts:
            for batch_size in batches:
                rows = _measured(models, context_len, batch_size, n_new, limits)
                yield from within(rows, shape=shape)


def make_models(fields: Mapping[str, Any], dtype: str) -> dict[str, Decoder]:
    """Returns the dense models and every variant with these sizes."""
    common = {"vocab_size": 256, **fields, "dtype": dtype}
    models = {
        DENSE: build_model(common),
        HALF: build_model(common | {"n_layers": common["n_layers"] // 2}),
    }
    for name, stag in VARIANTS.items():
        models[name] = build_model({**common, "name": "stagformer", "stagformer": stag})
    return models


@functools.lru_cache(maxsize=32)
def make_variables(model: Decoder) -> Any:
    """Returns random variables, weights in the model's dtype."""
    variables = model.init(jax.random.key(0))
    return jax.tree.map(lambda x: x.astype(model.config.dtype), variables)


def weight_bytes(model: Decoder) -> int:
    """Returns the bytes of weights that one decode step reads at least.

    Lanes that share weights read them once; passes one after the other read them again. The
    recurrent approximation runs one pass.
    """
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))["params"]
    size = np.dtype(jax.numpy.dtype(model.config.dtype)).itemsize

    def count(tree):
        return size * sum(leaf.size for leaf in jax.tree.leaves(tree))

    stag = model.config.stagformer
    is_loop = model.config.name == "stagformer" and stag.share_weights and not stag.recurrent
    in_turns = is_loop and (not stag.stagger or stag.decode == "sequential")
    again = (stag.n_stacks - 1) * count(shapes["stack"]) if in_turns else 0
    return count(shapes) + again


def read_bytes(model: Decoder, batch_size: int, max_len: int) -> int:
    """Returns the bytes of the cache that a decode step reads: all, or those of the last pass."""
    if model.config.stagformer.recurrent:
        layers = jax.eval_shape(lambda: model.init_cache(batch_size, max_len)).layers
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers[-1]))
    return cache_bytes(model, batch_size, max_len)


def step_flops(model: Decoder, n_past: int) -> float:
    """Returns the products of one token after n_past: of all passes, or of the last one."""
    config = model.config
    if not config.stagformer.recurrent:
        return flops.forward_flops_per_token(config, 1, n_past=n_past)
    n_layers = config.n_layers // config.stagformer.n_stacks
    one = dataclasses.replace(config, name="transformer", n_layers=n_layers)
    cross = n_layers * flops.cross_flops(config, Call(1, n_past))
    return flops.forward_flops_per_token(one, 1, n_past=n_past) + cross


def _measured(models, context_len: int, batch_size: int, n_new: int, limits) -> Iterator[Row]:
    cases, skipped = {}, {}
    for name, model in models.items():
        if cache_bytes(model, batch_size, context_len + n_new) > MAX_CACHE_BYTES:
            skipped[name] = {"skipped": f"a cache of over {MAX_CACHE_BYTES} bytes"}
            continue
        weights = functools.partial(make_variables, model)
        prefilled = prefill_case(model, batch_size, context_len, n_new, weights)
        cases[name] = loop_case(prefilled, model, n_new)
    measured = limits.measure(cases)
    device, middle = jax.devices()[0].device_kind, context_len + n_new // 2
    for name, (row, _) in measured.items():
        model = models[name]
        config = model.config
        max_len = context_len + n_new
        n_bytes = n_new * (weight_bytes(model) + read_bytes(model, batch_size, max_len))
        top = roofline.ceiling(device, config.dtype, is_quick=limits.is_quick)
        n_tokens = n_new * batch_size
        floor = roofline.floor_fields(
            n_bytes, round(n_tokens * step_flops(model, middle)), n_tokens, row["median_ms"], top
        )
        about = {
            "name": f"stacks {name}",
            "variant": name,
            "pass": "loop",
            "pattern": (name,),
            "context_len": context_len,
            "n_new_tokens": n_new,
            **shape_fields(config, batch_size, context_len),
        }
        sizes = {
            "cache_bytes": cache_bytes(model, batch_size, max_len),
            "weight_bytes": weight_bytes(model),
        }
        token = {"token_ms": round(row["median_ms"] / n_new, 5)}
        yield make(about, sizes | row | floor | token)
    where = {"context_len": context_len, "batch_size": batch_size}
    for name, why in skipped.items():
        yield make({"name": f"stacks {name}", "variant": name, **where}, why)
    for name, baseline in ((n, b) for n in measured for b in BASELINES if n != b and b in measured):
        about = {"name": f"ratio stacks {name} / {baseline}", "variant": name}
        about |= {"baseline": baseline, "pass": "loop", **where}
        yield make(about, speed_ratio(measured[name][1], measured[baseline][1]))
