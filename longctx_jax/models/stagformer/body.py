"""The family of staggered stacks, as the decoder knows it."""

import dataclasses

import jax

from longctx_jax.models import stack
from longctx_jax.models.body import Body
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stagformer.stacks import apply_staggered
from longctx_jax.models.stagformer.state import (
    decodes_in_lanes,
    init_caches,
    init_staggered,
    stack_config,
)


def prepare(config: ModelConfig) -> ModelConfig:
    """Returns the config; the pattern repeats within each stack, by default softmax attention.

    Raises:
        ValueError: if n_layers is not a multiple of stacks times pattern, or fields contradict.
    """
    config = config.with_pattern(("softmax",), tuple(config.mixers))
    stag = config.stagformer
    unit = stag.n_stacks * len(config.pattern)
    if config.n_layers % unit:
        raise ValueError(
            "config.model.n_layers must be a multiple of stagformer.n_stacks times the pattern's "
            f"length: got n_layers={config.n_layers}, {stag.n_stacks} stacks, "
            f"pattern={config.pattern}; use n_layers={-(-config.n_layers // unit) * unit}"
        )
    if stag.cross_cache == "memory" and config.segment_len:
        raise ValueError(
            "config.model.segment_len must be 0 with stagformer.cross_cache='memory', whose rows "
            f"all layers share: got {config.segment_len}; use cross_cache='kv'"
        )
    if config.layer_axis:
        raise ValueError(
            f"config.model.layer_axis does not fit stagformer: got {config.layer_axis!r}; use "
            "stagformer.stack_axis"
        )
    return config


def update_state(config: ModelConfig, state, aux, key):
    """Own weights: the axes [rows, stacks] of codebooks and counts become one of layers."""
    one = stack_config(config)
    if config.stagformer.share_weights:
        return stack.update_stack_state(one, state, aux, key)
    flat, flat_aux = _join_axes((state, aux))
    new = stack.update_stack_state(one, flat, flat_aux, key)
    return jax.tree.map(lambda leaf, old: leaf.reshape(old.shape), new, state)


def describe_state(config: ModelConfig, state):
    """Returns metrics of the non-gradient state of all stacks."""
    flat = state if config.stagformer.share_weights else _join_axes(state)
    return stack.describe_stack_state(stack_config(config), flat)


def exact(config: ModelConfig) -> ModelConfig:
    """Returns the config without the recurrent approximation; caches are the same."""
    if not config.stagformer.recurrent:
        return config
    stag = dataclasses.replace(config.stagformer, recurrent=False, decode="sequential")
    return dataclasses.replace(config, stagformer=stag)


def _join_axes(tree):
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


BODY = Body(
    prepare=prepare,
    init=init_staggered,
    init_cache=init_caches,
    apply=apply_staggered,
    update_state=update_state,
    describe_state=describe_state,
    row_axis=lambda config: 2 if decodes_in_lanes(config) else 1,
    exact=exact,
)
