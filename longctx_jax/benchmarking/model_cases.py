"""Whole models as cases to time: what suites share.

A row says its shape in the case (`shape_fields`), and its speed as measured (`speed_fields`).
Decoding: `decoding_cases.py`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.benchmarking.rows import Fields
from longctx_jax.benchmarking.timing import Case, Limits
from longctx_jax.models import build_model
from longctx_jax.models.config import ModelConfig, model_config
from longctx_jax.models.decoder import Decoder
from longctx_jax.nn.contract import Mixer
from longctx_jax.nn.mixers import MIXERS
from longctx_jax.training.optimizer import make_optimizer
from longctx_jax.training.state import init_state
from longctx_jax.training.step import make_train_step

BASELINE = "transformer"
DOCUMENT_LEN = 4096  # mean tokens a document of the random batches
SMALL = {"n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 64, "d_key": 0, "d_value": 0}


Mixers = Mapping[str, Mixer]


def with_outside(kinds: tuple[str, ...], mixers: Mixers) -> tuple[str, ...]:
    """Returns the kinds that a suite compares, and those that a user brought."""
    return (*kinds, *(kind for kind in mixers if kind not in MIXERS))


def base_model(config: Any, limits: Limits, mixers: Mixers = MIXERS) -> ModelConfig:
    """Returns the plain transformer of config.model's sizes (tiny when quick)."""
    fields = dict(config.model) | {"name": BASELINE, "pattern": ()}
    if limits.is_quick:
        fields |= SMALL
    return model_config(fields, mixers)


def variant(model: ModelConfig, pattern: tuple[str, ...], **fields) -> Decoder:
    """Returns the model with another pattern of mixers and other fields."""
    return build_model(dataclasses.replace(model, pattern=pattern, **fields))


def shape_fields(model: ModelConfig, batch_size: int, seq_len: int) -> Fields:
    """Returns the fields that say which shape a row is about."""
    names = ("n_layers", "d_model", "n_heads", "d_ff", "vocab_size", "dtype", "remat", "unroll")
    fields = {name: getattr(model, name) for name in names}
    return {"batch_size": batch_size, "seq_len": seq_len, **fields}


def speed_fields(row: Fields, n_tokens: float, flops_per_token: float) -> Fields:
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
