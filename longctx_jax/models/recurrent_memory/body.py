"""The family of recurrent memory, as the decoder knows it."""

import jax

from longctx_jax.models import plain
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.recurrent_memory.segments import apply_recurrence
from longctx_jax.models.recurrent_memory.state import (
    State,
    add_memory,
    backbone_config,
    init_recurrence,
    init_state,
)


def prepare(config: ModelConfig) -> ModelConfig:
    """Returns the config; by default all layers are softmax attention with memory."""
    if config.recurrence == "armt":
        return config.with_pattern(("armt",))
    return config.with_pattern((config.memory.mixer,), tuple(config.mixers))


def init(config: ModelConfig, key):
    """Returns parameters {"stack", "memory"} and non-gradient state."""
    params, state = plain.init(config, key)
    params["memory"] = init_recurrence(config, jax.random.fold_in(key, 2**31 - 1))
    return params, state


def apply(config: ModelConfig, params, state, x, documents, cache, *, norm, key, train):
    """Runs the stack segment by segment; see `Body`."""
    before = None if cache is None else State(*cache)
    parts = {"stack": params["stack"], "state": state, "memory": params["memory"]}
    return apply_recurrence(config, parts, x, documents, before, norm=norm, key=key, train=train)


BODY = plain.BODY._replace(
    prepare=prepare,
    init=init,
    init_cache=init_state,
    apply=apply,
    backbone=backbone_config,
    add_to_backbone=add_memory,
)
