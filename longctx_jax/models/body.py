"""`Body`: what stands between a decoder's embedding and its last norm, one a family of models.

Four families: layers one after another; the same with a memory between segments; stacks side by
side; and layers that read nothing but the embeddings. Each brings its own parameters, caches, and
way through a call, in a folder (or file) of its own; `families.py` says which a config means.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from longctx_jax.models.config import ModelConfig
from longctx_jax.typing import PyTree


def _itself(config: ModelConfig) -> ModelConfig:
    return config


def _nothing(config: ModelConfig) -> None:
    del config


def _keep_state(config, state, aux, key):
    del config, aux, key
    return state


def _no_metrics(config, state):
    del config, state
    return {}


class Body(NamedTuple):
    """Pure functions of a family; `config` comes first everywhere."""

    # config -> config with its pattern filled in; ValueError if fields contradict each other
    prepare: Callable[[ModelConfig], ModelConfig]
    # (config, key) -> (params, non-gradient state of the layers): dicts, params at the top level
    init: Callable[..., tuple[dict[str, PyTree], dict[str, PyTree]]]
    # (config, batch_size, max_len) -> (caches of the layers, what else goes from call to call)
    init_cache: Callable[..., tuple[Any, Any]]
    # (config, params, state, x, documents, cache, *, norm, key, train) -> (normed, cache, aux);
    # and, if it picks outputs: source, wanted
    apply: Callable[..., tuple[jax.Array, tuple[Any, Any] | None, Any]]
    # (config, state, aux, key) -> state
    update_state: Callable[..., dict[str, PyTree]] = _keep_state
    # (config, state) -> metrics
    describe_state: Callable[..., dict[str, jax.Array]] = _no_metrics
    # config -> axis of the batch in the caches of the layers
    row_axis: Callable[[ModelConfig], int] = lambda config: 1
    picks_outputs: bool = False  # tokens whose output nobody wants pass through no layer
    # config -> that of the model for prompts, without what approximates single tokens
    exact: Callable[[ModelConfig], ModelConfig] = _itself
    # config -> that of the model which is wrapped, for families that wrap one
    backbone: Callable[[ModelConfig], ModelConfig | None] = _nothing
    # (config, fresh variables, variables of the backbone) -> variables
    add_to_backbone: Callable[..., dict[str, PyTree]] | None = None


class Source(NamedTuple):
    """What the embeddings come from."""

    tokens: jax.Array  # int32 [batch, seq]
    embed: Callable[[jax.Array], jax.Array]  # ids -> embeddings


class Wanted(NamedTuple):
    """Which tokens of a call are to have outputs."""

    outputs: str = "all"  # one of OUTPUTS
    at: jax.Array | None = None  # int32 [n], increasing; None = as `outputs` says


OUTPUTS = ("all", "last", "none")
