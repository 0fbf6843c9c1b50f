"""What the laws are tested over: every mixer of the registry in its examples, and one from outside.

A new mixer is in every law the moment it is in the registry.
"""

import functools

import jax
import numpy as np
import pytest

from longctx_jax.models import build_model
from longctx_jax.nn.mixers.outside import load_mixers
from tests.helpers import random_variables
from tests.tiny import tiny_config

BATCH, SEQ = 2, 24
SIZES = {"n_layers": 2, "d_model": 16, "n_heads": 2, "vocab_size": 11, "d_ff": 24}
TOKENS = np.random.default_rng(0).integers(0, 11, (BATCH, SEQ), np.int32)
SEGMENTS = np.array([[0] * 2 + [1] * 9 + [2] + [0] * 12, [3] * 10 + [4] * 14], np.int32)

MIXERS, OUTSIDE = load_mixers(["tests.laws.running_mean:MIXER", "tests.laws.gla:MIXER"])
OTHERS = {"one": MIXERS["running_mean"], "two": MIXERS["running_mean"]}  # a mapping, as a place
# "kind-example" -> fields of config.model
CASES = {
    f"{kind}-{example}": {"pattern": (kind,), **fields}
    for kind, mixer in MIXERS.items()
    for example, fields in mixer.examples.items()
}
MIXTURES = {
    "mixed": {
        "pattern": ("decay", "decay", "sliding"),
        "n_layers": 3,
        "n_kv_heads": 1,
        "tie_embeddings": False,
        "decay": {"chunk_len": 4},
        "sliding": {"window_len": 5},
    },
}
FAST = ("decay-gated", "running_mean-mean")


def laws(names=tuple(CASES), fast=FAST):
    """Returns the parameters of a law: two of them fast, all for the slow suite."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in names]


over_mixers = pytest.mark.parametrize("name", laws())


def fields_of(name, **changes):
    """Returns the fields of a case's tiny model."""
    return {**SIZES, **{**CASES, **MIXTURES}[name], **changes}


@functools.cache
def _build(name, changes):
    return build_model(fields_of(name, **dict(changes)), MIXERS)


def build(name, **changes):
    """Returns the tiny model of a case; the same for the same changes."""
    return _build(name, tuple(sorted(changes.items())))


@functools.cache
def variables_of(model):
    """Returns random variables; relative biases and norms are not at their neutral start."""
    return random_variables(lambda: model.init(jax.random.key(0)))


def config_of(name, **fields):
    """Returns the whole config of a tiny run of a case."""
    config = tiny_config(**fields)
    changes = {**fields_of(name), "vocab_size": 256, "outside_mixers": OUTSIDE}
    with config.unlocked():
        for field, value in changes.items():
            if field in config.model and isinstance(value, dict):
                config.model[field].update(value)
            else:
                config.model[field] = value
    return config
