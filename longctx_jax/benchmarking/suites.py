"""What the suite `train` measures, as functions of a config that yield rows.

It has three parts: "models" (a full update of each model and of the yardstick at the config's
shape, in turns), "lengths" (longer and longer sequences at constant tokens a step), "schedules"
(the same small stack in every order, its number of cells beside its time). How a row is timed:
`timing.py`; its fields: results/README.md. Not here: its part
"saves" (`saving_suite.py`), the suite `decode` (`decode_suite.py`).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.accounting import flops
from longctx_jax.benchmarking import timing, yardstick
from longctx_jax.benchmarking.timing import Case, Row
from longctx_jax.models import build_model
from longctx_jax.models.config import ModelConfig, model_config
from longctx_jax.models.decoder import Decoder
from longctx_jax.models.schedules.diagonal import diagonal_cells
from longctx_jax.training.optimizer import make_optimizer
from longctx_jax.training.state import init_state
from longctx_jax.training.step import make_train_step

PARTS = ("models", "lengths", "schedules")
YARDSTICK = "yardstick"
BASELINE = "transformer"
DOCUMENT_LEN = 4096  # mean tokens a document of the random batches
SMALL = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 64, "d_key": 0, "d_value": 0}


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long a suite measures: see `timing.measure_in_turns`.

    Attributes:
        is_quick: shapes so small that they only show that everything runs.
        lengths: sequence or context lengths instead of the suite's own; () = those.
    """

    n_runs: int = 20
    n_warmup: int = 2
    max_seconds: float = 0.0
    is_quick: bool = False
    lengths: tuple[int, ...] = ()

    def measure(self, cases: dict[str, Case]) -> dict[str, tuple[Row, np.ndarray]]:
        """Returns `measure_in_turns` of the cases within these limits."""
        return timing.measure_in_turns(
            cases, n_runs=self.n_runs, n_warmup=self.n_warmup, max_seconds=self.max_seconds
        )


def train_rows(config: Any, limits: Limits, parts: Sequence[str] = PARTS) -> Iterator[Row]:
    """Yields the rows of the suite `train`, part after part.

    Args:
        config: a whole config; its model sizes, optim, train.loss_chunk_len, data.seq_len and
            data.global_batch_size count.
        limits: how long to measure.
        parts: of `PARTS`, which to run.
    """
    run = {"models": _models_part, "lengths": _lengths_part, "schedules": _schedules_part}
    for part in parts:
        for row in run[part](config, limits):
            yield {"suite": "train", "part": part, **row}


def base_model(config: Any, limits: Limits) -> ModelConfig:
    """Returns the plain transformer of config.model's sizes (tiny when quick)."""
    fields = dict(config.model) | {"name": BASELINE, "pattern": ()}
    if limits.is_quick:
        fields |= SMALL
    return model_config(fields)


def variant(model: ModelConfig, pattern: tuple[str, ...], **fields) -> Decoder:
    """Returns the model with another pattern of mixers and other fields."""
    return build_model(dataclasses.replace(model, pattern=pattern, **fields))


def shape_fields(model: ModelConfig, batch_size: int, seq_len: int) -> Row:
    """Returns the fields that say which shape a row is about."""
    names = ("n_layers", "d_model", "n_heads", "d_ff", "vocab_size", "dtype", "remat", "unroll")
    fields = {name: getattr(model, name) for name in names}
    return {"batch_size": batch_size, "seq_len": seq_len, **fields}


def speed_fields(row: Row, n_tokens: float, flops_per_token: float) -> Row:
    """Returns tokens_per_s and model_flops_per_s at the row's median."""
    per_s = n_tokens / (row["median_ms"] / 1e3)
    return {
        "tokens_per_s": round(per_s, 2),
        "model_flops_per_token": flops_per_token,
        "model_flops_per_s": round(per_s * flops_per_token),
    }


def make_batch(
    rng: np.random.Generator, batch_size: int, seq_len: int, vocab_size: int
) -> dict[str, jax.Array]:
    """Returns random tokens with documents, in the fields of a batch of the data pipeline."""
    shape = (batch_size, seq_len)
    ids = rng.integers(0, vocab_size, (batch_size, seq_len + 1), np.int32)
    starts = rng.random(shape) < 1 / DOCUMENT_LEN
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": np.ones(shape, np.float32),
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
    }
    return jax.tree.map(jnp.asarray, batch)


def train_case(
    config: Any,
    model: Decoder,
    batch_size: int,
    seq_len: int,
    *,
    cache_len: int = 0,
    has_documents: bool = True,
) -> Case:
    """Returns the full update of a model; each run continues from the state of the last one."""
    tx, _ = make_optimizer(config.optim, config.train.n_steps)
    step = make_train_step(model, tx, loss_chunk_len=config.train.loss_chunk_len)
    rng = np.random.default_rng(0)

    def make_inputs(last):
        if last is None:
            sizes = {"batch_size": batch_size, "cache_len": cache_len}
            state = init_state(model, tx, seed=0, use_ema=False, **sizes)
        else:
            state = last[0]
        batch = make_batch(rng, batch_size, seq_len, model.config.vocab_size)
        if not has_documents:
            del batch["segment_ids"]
        return state, batch

    return Case(step, make_inputs)


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


def _models_part(config: Any, limits: Limits) -> Iterator[Row]:
    base = base_model(config, limits)
    batch_size, seq_len = train_shape(config, limits)
    pattern = pattern_for(base.n_layers)
    runs: dict[str, tuple[tuple[str, ...], int, bool]] = {  # pattern, cache_len, documents
        BASELINE: (("softmax",), 0, True),
        f"{BASELINE}, no documents": (("softmax",), 0, False),
        f"{BASELINE}, carried cache": (("softmax",), seq_len, True),
        "decay": (("decay",), 0, True),
        "decay, carried cache": (("decay",), seq_len, True),
    }
    if pattern:
        runs[f"pattern {'-'.join(pattern)}"] = (pattern, 0, True)
    cases, models = {}, {}
    differing = yardstick_differs(config, base)
    if not differing:
        cases[YARDSTICK] = yardstick_case(config, base, batch_size, seq_len)
    for name, (mixers, cache_len, has_documents) in runs.items():
        models[name] = variant(base, mixers)
        past = {"cache_len": cache_len, "has_documents": has_documents}
        cases[name] = train_case(config, models[name], batch_size, seq_len, **past)
    measured = limits.measure(cases)
    for name, (row, _) in measured.items():
        mixers, cache_len, has_documents = runs.get(name, (("softmax",), 0, False))
        model = models.get(name, models[BASELINE]).config
        past = {"n_past": cache_len, "cache_len": cache_len}
        per_token = flops.train_flops_per_token(model, seq_len, **past)
        yield {
            "name": name,
            "pattern": mixers,
            "cache_len": cache_len,
            "has_documents": has_documents,
            **shape_fields(model, batch_size, seq_len),
            **row,
            **speed_fields(row, batch_size * seq_len, per_token),
        }
    if differing:
        yield {"name": "ratio", "skipped": f"the yardstick differs in {', '.join(differing)}"}
    else:
        yield from _ratios(measured, base, batch_size, seq_len)


def _ratios(measured, base: ModelConfig, batch_size: int, seq_len: int) -> Iterator[Row]:
    """Yields the speed over the yardstick's, from runs of the same round."""
    yard = measured[YARDSTICK][1]
    for name in (BASELINE, f"{BASELINE}, no documents"):
        low, median, high = np.quantile(yard / measured[name][1], [0.25, 0.5, 0.75])
        yield {
            "name": f"ratio {name} / {YARDSTICK}",
            **shape_fields(base, batch_size, seq_len),
            "n_runs": len(yard),
            "speed_ratio": round(float(median), 4),
            "speed_ratio_quartile_1": round(float(low), 4),
            "speed_ratio_quartile_3": round(float(high), 4),
        }


def _lengths_part(config: Any, limits: Limits) -> Iterator[Row]:
    base = base_model(config, limits)
    batch_size, seq_len = train_shape(config, limits)
    tokens = batch_size * seq_len
    lengths = limits.lengths or ((16,) if limits.is_quick else (256, 512, 1024, 2048, 4096))
    for length in lengths:
        rows = max(1, tokens // length)
        models = {kind: variant(base, (kind,)) for kind in ("softmax", "sliding", "decay")}
        cases = {kind: train_case(config, model, rows, length) for kind, model in models.items()}
        for kind, (row, _) in limits.measure(cases).items():
            per_token = flops.train_flops_per_token(models[kind].config, length)
            yield {
                "name": kind,
                "pattern": (kind,),
                **shape_fields(base, rows, length),
                **row,
                **speed_fields(row, rows * length, per_token),
            }


def _schedules_part(config: Any, limits: Limits) -> Iterator[Row]:
    """One row of a batch, many segments: where the diagonal schedule is meant to help."""
    sizes = SMALL | {"n_layers": 8, "d_model": 64, "d_ff": 192}
    n_layers, n_segments, length = 8, 16, 64
    if limits.is_quick:
        n_layers, n_segments, length = 2, 4, 8
    base = model_config(
        dict(config.model) | sizes | {"name": BASELINE, "pattern": (), "n_layers": n_layers}
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
            yield {
                "name": name,
                "pass": kind,
                "schedule": model.schedule,
                "n_ramp_buckets": model.n_ramp_buckets if model.schedule == "diagonal" else 0,
                "segment_len": model.segment_len or seq_len,
                "n_segments": n_segments if model.segment_len else 1,
                "cells": cells if model.segment_len else n_layers,
                "useful_cells": useful if model.segment_len else n_layers,
                "padded_cells": (n_segments + n_layers - 1) * n_layers,
                **shape_fields(model, 1, seq_len),
                **row,
                **speed_fields(row, seq_len, per_token),
            }


def forward_case(model: Decoder, batch_size: int, seq_len: int) -> Case:
    """Returns the logits of one call without a cache."""
    variables = functools.cache(lambda: model.init(jax.random.key(0)))
    rng = np.random.default_rng(0)

    def make_inputs(last):
        del last
        batch = make_batch(rng, batch_size, seq_len, model.config.vocab_size)
        return variables(), batch["tokens"]

    return Case(
        jax.jit(lambda variables, tokens: model.apply(variables, tokens).logits), make_inputs
    )
