"""A run folder around given weights: config, checkpoint of step 0, first metric record."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax import run_files
from longctx_jax.training.checkpoint import Checkpointer
from longctx_jax.training.start import resolved
from longctx_jax.training.state import TrainState
from longctx_jax.typing import PyTree


def require_new(folder: pathlib.Path, flag: str = "--workdir") -> None:
    """Raises ValueError if a folder holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{flag} must be a new or empty folder, so that nothing is mixed or lost: {folder} "
            "holds something; choose another name or delete it"
        )


def write_run(workdir: pathlib.Path, config: Any, variables: dict[str, PyTree]) -> None:
    """Writes a run whose newest checkpoint, of step 0, has these weights and no optimizer state.

    The config is written last: without it a folder is no run.

    Raises:
        CheckpointError: if the checkpoint cannot be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        opt_state={},
        ema={},
        model_state=variables["model_state"],
        cache={},
        key=jax.random.key(config.train.seed),
    )
    checkpointer = Checkpointer(workdir)
    checkpointer.save(0, state, resolved(config))
    checkpointer.close()
    record = {"step": 0, "tokens": 0, "seconds": 0.0}
    (workdir / run_files.METRICS).write_text(json.dumps(record) + "\n")
    run_files.write_json(workdir / run_files.CONFIG, resolved(config))
