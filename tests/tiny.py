"""A config so small that a training run takes a second, on real text: files of this project."""

import pathlib
from typing import Any

import ml_collections

from configs import base

PROJECT = pathlib.Path(__file__).resolve().parent.parent
TEXT = str(PROJECT / "longctx_jax" / "ops" / "*.py")

# As flags of scripts.train; `tiny_config` sets the same fields.
FIELDS: dict[str, Any] = {
    "model.n_layers": 1,
    "model.d_model": 16,
    "model.n_heads": 2,
    "data.name": "text",
    "data.files": (TEXT,),
    "data.seq_len": 16,
    "data.global_batch_size": 4,
    "data.n_workers": 1,
    "optim.warmup_steps": 2,
    "optim.schedule": "constant",
    "train.n_steps": 6,
    "train.checkpoint_every": 3,
    "eval.every": 0,
    "eval.max_bytes": 500,
    "log.every": 1,
    "log.tensorboard": False,
}


def tiny_config(**fields: Any) -> ml_collections.ConfigDict:
    """Returns the tiny config; keyword `train__n_steps=3` sets config.train.n_steps."""
    config = base.get_config()
    changes = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    config.update_from_flattened_dict(changes)
    return config


def flags(**fields: Any) -> list[str]:
    """Returns the tiny config as command-line flags of scripts.train."""
    changes = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    return [f"--config.{name}={value}" for name, value in changes.items()]
