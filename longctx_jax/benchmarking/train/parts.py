"""Parts of the suite `train`: whole updates, as functions of a config that yield rows.

"models" (a full update of each model and of the yardstick at the config's shape, in turns),
"lengths" (longer and longer sequences at constant tokens a step), "schedules" (the same small stack
in every order, its number of cells beside its time). Not here: "saves" (`saves.py`).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from longctx_jax.accounting import flops
from longctx_jax.benchmarking.model_cases import (
    BASELINE,
    SMALL,
    Mixers,
    base_model,
    forward_case,
    make_batch,
    shape_fields,
    speed_fields,
    train_case,
    variant,
    with_outside,
)
from longctx_jax.benchmarking.ratios import speed_ratio
from longctx_jax.benchmarking.rows import Row, make
from longctx_jax.benchmarking.timing import Case, Limits, Measured
from longctx_jax.benchmarking.train import yardstick
from longctx_jax.models import build_model
from longctx_jax.models.config import ModelConfig, model_config
from longctx_jax.models.schedules.diagonal import diagonal_cells
from longctx_jax.nn.mixers import MIXERS
from longctx_jax.training.optimizer import make_optimizer

YARDSTICK = "yardstick"
KINDS = ("softmax", "sliding", "decay")


def yardstick_case(config: Any, model: ModelConfig, batch_size: int, seq_len: int) -> Case:
    """Returns the yardstick's update at the same shape with the same optimizer settings."""
    names = ("n_layers", "d_model", "n_heads", "d_ff", "vocab_size", "dtype")
    shape = yardstick.Shape(
        **{name: getattr(model, name) for name in names}, rope_theta=model.of("softmax").rope_theta
    )
    optim = config.optim
    _, schedule = make_optimizer(optim, config.train.n_steps)
    tx = yardstick.make_optimizer(
        schedule,
        b1=optim.beta1,
        b2=optim.beta2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm or float("inf"),
    )
    rng = np.random.default_rng(0)

    def make_inputs(last):
        if last is None:
            params = yardstick.init_params(jax.random.key(0), shape)
            last = ((params, tx.init(params)), None)
        batch = make_batch(rng, batch_size, seq_len, model.vocab_size)
        return last[0], batch["tokens"], batch["targets"]

    return Case(yardstick.make_train_step(shape, tx), make_inputs)


def yardstick_differs(config: Any, model: ModelConfig) -> list[str]:
    """Returns the settings that make the config's transformer another model than the yardstick."""
    wanted = {
        "n_kv_heads": model.n_heads,
        "d_key": model.d_model // model.n_heads,
        "d_value": model.d_model // model.n_heads,
        "mlp": "swiglu",
        "norm": "rms",
        "tie_embeddings": True,
        "dropout": 0.0,
        "remat": "none",
        "segment_len": 0,
    }
    differing = [f"model.{name}" for name, value in wanted.items() if getattr(model, name) != value]
    softmax = {"position": "rotary", "qk_norm": False}
    differing += [
        f"model.softmax.{n}"
        for n, value in softmax.items()
        if getattr(model.of("softmax"), n) != value
    ]
    return differing + (["optim.name"] if config.optim.name != "adamw" else [])


def pattern_for(n_layers: int) -> tuple[str, ...]:
    """Returns the longest of the patterns to show that divides n_layers; () = none does."""
    for pattern in (("decay", "decay", "sliding"), ("decay", "sliding")):
        if n_layers % len(pattern) == 0:
            return pattern
    return ()


def train_shape(config: Any, limits: Limits) -> tuple[int, int]:
    """Returns (batch size, tokens a row) of the parts "models" and "lengths"."""
    return (2, 32) if limits.is_quick else (config.data.global_batch_size, config.data.seq_len)


def models_part(config: Any, limits: Limits, mixers: Mixers = MIXERS) -> Iterator[Row]:
    """Yields an update of every model, and the ratios to the yardstick.

    Args:
        config: a whole config; its model sizes, optim, train.loss_chunk_len, data.seq_len and
            data.global_batch_size count.
        limits: how long to measure.
    """
    base = base_model(config, limits, mixers)
    batch_size, seq_len = train_shape(config, limits)
    pattern = pattern_for(base.n_layers)
    runs: dict[str, tuple[tuple[str, ...], int, bool]] = {  # pattern, cache_len, documents
        BASELINE: (("softmax",), 0, True),
        f"{BASELINE}, no documents": (("softmax",), 0, False),
        f"{BASELINE}, carried cache": (("softmax",), seq_len, True),
        "decay": (("decay",), 0, True),
        "decay, carried cache": (("decay",), seq_len, True),
    }
    runs |= {kind: ((kind,), 0, True) for kind in with_outside((), mixers)}
    if pattern:
        runs[f"pattern {'-'.join(pattern)}"] = (pattern, 0, True)
    cases, models = {}, {}
    differing = yardstick_differs(config, base)
    if not differing:
        cases[YARDSTICK] = yardstick_case(config, base, batch_size, seq_len)
    for name, (kinds, cache_len, has_documents) in runs.items():
        models[name] = variant(base, kinds)
        past = {"cache_len": cache_len, "has_documents": has_documents}
        cases[name] = train_case(config, models[name], batch_size, seq_len, **past)
    measured = limits.measure(cases)
    for name, (row, _) in measured.items():
        kinds, cache_len, has_documents = runs.get(name, (("softmax",), 0, False))
        model = models.get(name, models[BASELINE]).config
        past = {"n_past": cache_len, "cache_len": cache_len}
        per_token = flops.train_flops_per_token(model, seq_len, **past)
        about = {"name": name, "pattern": kinds, "cache_len": cache_len}
        about |= {"has_documents": has_documents, **shape_fields(model, batch_size, seq_len)}
        yield make(about, row | speed_fields(row, batch_size * seq_len, per_token))
    if differing:
        reason = f"the yardstick differs in {', '.join(differing)}"
        yield make({"name": "ratio"}, {"skipped": reason})
    else:
        yield from _ratios(measured, base, batch_size, seq_len)


def _ratios(measured: Measured, base: ModelConfig, batch_size: int, seq_len: int) -> Iterator[Row]:
    """Yields the speed over the yardstick's, from runs of the same round."""
    for name in (BASELINE, f"{BASELINE}, no documents"):
        about = {"name": f"ratio {name} / {YARDSTICK}", **shape_fields(base, batch_size, seq_len)}
        yield make(about, speed_ratio(measured[name][1], measured[YARDSTICK][1]))


def lengths_part(config: Any, limits: Limits, mixers: Mixers = MIXERS) -> Iterator[Row]:
    """Yields updates of longer and longer sequences."""
    base = base_model(config, limits, mixers)
    batch_size, seq_len = train_shape(config, limits)
    tokens = batch_size * seq_len
    lengths = limits.lengths or ((16,) if limits.is_quick else (256, 512, 1024, 2048, 4096))
    for length in lengths:
        rows = max(1, tokens // length)
        models = {kind: variant(base, (kind,)) for kind in with_outside(KINDS, mixers)}
        cases = {kind: train_case(config, model, rows, length) for kind, model in models.items()}
        for kind, (row, _) in limits.measure(cases).items():
            per_token = flops.train_flops_per_token(models[kind].config, length)
            about = {"name": kind, "pattern": (kind,), **shape_fields(base, rows, length)}
            yield make(about, row | speed_fields(row, rows * length, per_token))


def schedules_part(config: Any, limits: Limits, mixers: Mixers = MIXERS) -> Iterator[Row]:
    """One row of a batch, many segments: where the diagonal schedule is meant to help."""
    sizes = SMALL | {"n_layers": 8, "d_model": 64, "d_ff": 192}
    n_layers, n_segments, length = 8, 16, 64
    if limits.is_quick:
        n_layers, n_segments, length = 2, 4, 8
    base = model_config(
        dict(config.model) | sizes | {"name": BASELINE, "pattern": (), "n_layers": n_layers},
        mixers,
    )
    base = dataclasses.replace(base, pattern=("decay",), segment_len=length)
    seq_len = n_segments * length
    orders: dict[str, dict[str, Any]] = {
        "layerwise, one segment": {"schedule": "layerwise", "segment_len": 0},
        "layerwise": {"schedule": "layerwise"},
        "sequential": {"schedule": "sequential"},
    }
    for n in (1,) if limits.is_quick else (1, 2, 4):
        orders[f"diagonal, {n} ramp buckets"] = {"schedule": "diagonal", "n_ramp_buckets": n}
    models = {name: build_model(dataclasses.replace(base, **o)) for name, o in orders.items()}
    forward = {name: forward_case(model, 1, seq_len) for name, model in models.items()}
    train = {name: train_case(config, model, 1, seq_len) for name, model in models.items()}
    useful = n_layers * n_segments
    for kind, cases in (("forward", forward), ("train", train)):
        for name, (row, _) in limits.measure(cases).items():
            model = models[name].config
            cells = useful
            if model.schedule == "diagonal":
                cells = diagonal_cells(n_segments, n_layers, 1, model.n_ramp_buckets)
            factor = flops.TRAIN_FACTOR if kind == "train" else 1
            per_token = factor * flops.forward_flops_per_token(model, seq_len)
            about = {
                "name": name,
                "pass": kind,
                "schedule": model.schedule,
                "n_ramp_buckets": model.n_ramp_buckets if model.schedule == "diagonal" else 0,
                "segment_len": model.segment_len or seq_len,
                "n_segments": n_segments if model.segment_len else 1,
                **shape_fields(model, 1, seq_len),
            }
            counted = {
                "cells": cells if model.segment_len else n_layers,
                "useful_cells": useful if model.segment_len else n_layers,
                "padded_cells": (n_segments + n_layers - 1) * n_layers,
            }
            yield make(about, counted | row | speed_fields(row, seq_len, per_token))
