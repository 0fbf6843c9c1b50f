"""What stands between a decoder's embedding and its last norm: one body a family of models.

Four families: layers one after another; the same with a memory between segments; stacks side by
side; and layers that read nothing but the embeddings. Each brings its own parameters, caches, and
way through a call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from longctx_jax.models import (
    initial,
    recurrence,
    recurrence_state,
    stack,
    staggered,
    staggered_state,
)
from longctx_jax.models.config import ModelConfig
from longctx_jax.typing import PyTree


class Body(NamedTuple):
    """Pure functions of a family; `config` comes first everywhere."""

    # (config, key) -> (params, non-gradient state of the layers): dicts, params at the top level
    init: Callable[..., tuple[dict[str, PyTree], dict[str, PyTree]]]
    # (config, batch_size, max_len) -> (caches of the layers, what else goes from call to call)
    init_cache: Callable[..., tuple[Any, Any]]
    # (config, params, state, x, documents, cache, *, norm, key, train) -> (normed, cache, aux);
    # and, if it picks outputs: source, wanted
    apply: Callable[..., tuple[jax.Array, tuple[Any, Any] | None, Any]]
    # (config, state, aux, key) -> state
    update_state: Callable[..., dict[str, PyTree]]
    # (config, state) -> metrics
    describe_state: Callable[..., dict[str, jax.Array]]
    row_axis: int = 1  # of the batch, in the caches of the layers
    picks_outputs: bool = False  # tokens whose output nobody wants pass through no layer


def body_of(config: ModelConfig) -> Body:
    """Returns the body of the model's family."""
    if config.name == "stagformer":
        in_lanes = staggered_state.decodes_in_lanes(config)
        return STAGGERED._replace(row_axis=2 if in_lanes else 1)
    if config.name == "inattention":
        return INITIAL
    return PLAIN if config.recurrence == "none" else RECURRENT


def _init_plain(config, key):
    params, state = stack.init_stack(config, key)
    return {"stack": params}, state


def _init_plain_cache(config, batch_size, max_len):
    return stack.init_stack_cache(config, batch_size, max_len), ()


def _apply_plain(config, params, state, x, documents, cache, *, norm, key, train):
    layers = None if cache is None else cache[0]
    x, layers, aux = stack.apply_stack(
        config, params["stack"], state, x, documents, layers, key=key, train=train
    )
    return norm(x), None if layers is None else (layers, ()), aux


def _init_recurrent(config, key):
    params, state = _init_plain(config, key)
    memory_key = jax.random.fold_in(key, 2**31 - 1)
    params["memory"] = recurrence_state.init_recurrence(config, memory_key)
    return params, state


def _apply_recurrent(config, params, state, x, documents, cache, *, norm, key, train):
    before = None if cache is None else recurrence_state.State(*cache)
    parts = {"stack": params["stack"], "state": state, "memory": params["memory"]}
    return recurrence.apply_recurrence(
        config, parts, x, documents, before, norm=norm, key=key, train=train
    )


def _update_staggered(config, state, aux, key):
    """Own weights: the axes [rows, stacks] of codebooks and counts become one of layers."""
    one = staggered_state.stack_config(config)
    if config.stagformer.share_weights:
        return stack.update_stack_state(one, state, aux, key)
    flat, flat_aux = _join_axes((state, aux))
    new = stack.update_stack_state(one, flat, flat_aux, key)
    return jax.tree.map(lambda leaf, old: leaf.reshape(old.shape), new, state)


def _describe_staggered(config, state):
    one = staggered_state.stack_config(config)
    flat = state if config.stagformer.share_weights else _join_axes(state)
    return stack.describe_stack_state(one, flat)


def _join_axes(tree):
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


PLAIN = Body(
    _init_plain,
    _init_plain_cache,
    _apply_plain,
    stack.update_stack_state,
    stack.describe_stack_state,
)
RECURRENT = PLAIN._replace(
    init=_init_recurrent, init_cache=recurrence_state.init_state, apply=_apply_recurrent
)
STAGGERED = Body(
    staggered_state.init_staggered,
    staggered_state.init_caches,
    staggered.apply_staggered,
    _update_staggered,
    _describe_staggered,
)
INITIAL = Body(
    initial.init_initial,
    initial.init_memory,
    initial.apply_initial,
    lambda config, state, aux, key: state,
    lambda config, state: {},
    picks_outputs=True,
)
