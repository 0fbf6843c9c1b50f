"""A run's folder as a model with its weights."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from longctx_jax.models import build_model
from longctx_jax.models.decoder import Decoder
from longctx_jax.nn.contract import Mixer
from longctx_jax.nn.mixers import MIXERS
from longctx_jax.training.checkpoint import Checkpointer
from longctx_jax.typing import PyTree


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run restored for use: its config, model, weights and step."""

    config: Any
    model: Decoder
    variables: dict[str, PyTree]
    step: int


def restore_run(
    workdir: str | os.PathLike[str],
    config: Any,
    step: int = -1,
    mixers: Mapping[str, Mixer] = MIXERS,
) -> TrainedRun:
    """Returns the run in `workdir` at a step, -1 = the newest whole checkpoint.

    The averaged weights are taken where the run keeps them.

    Args:
        workdir: of the run.
        config: of the run, as its config.json has it.
        step: of the checkpoint.
        mixers: what the words of its pattern mean.

    Raises:
        FileNotFoundError: no such step.
        ValueError: the folder is something else, or a mixer is missing.
        CheckpointError: damaged files.
    """
    model = build_model(config.model, mixers)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    field = "ema" if config.train.ema_decay else "params"
    template = {field: variables["params"], "model_state": variables["model_state"]}
    checkpointer = Checkpointer(workdir, is_read_only=True)
    if step >= 0:
        restored = checkpointer.restore(step, template)
    else:
        restored = checkpointer.restore_latest(template)
    if restored is None:
        raise FileNotFoundError(
            f"--workdir must have a checkpoint: {workdir} has none yet; let scripts.train run on"
        )
    state = restored.state
    logging.info("workdir=%s step=%d weights=%s", workdir, restored.step, field)
    variables = {"params": state[field], "model_state": state["model_state"]}
    return TrainedRun(config, model, variables, restored.step)
