"""Stacked parameters, state and caches of a patterned stack, rematerialisation, and its schedule.

Parameters of pattern position p live under "<p>_<kind>" with a leading axis n_layers / P, so one
tree feeds `lax.scan` over depth, `vmap` over an anti-diagonal, and path rules for sharding. So does
non-gradient state, for the mixers that have any.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.schedules import run_stack
from longctx_jax.models.schedules.context_parallel import axis_size
from longctx_jax.models.segments import run_in_segments
from longctx_jax.nn.blocks import Block
from longctx_jax.nn.contract import Aux, Documents, Sizes
from longctx_jax.nn.partition import spread_tokens
from longctx_jax.nn.ring_lending import lend, settle
from longctx_jax.typing import PRNGKey, PyTree


def call_module(
    module: nn.Module, params: PyTree, *args: Any, state: PyTree = None, **options: Any
) -> Any:
    """Returns module.apply of one parameter tree: no collection is ever mutable here."""
    variables = {"params": params, "model_state": state} if state else {"params": params}
    return module.apply(variables, *args, **options)


def sizes_of(config: ModelConfig) -> Sizes:
    """Returns what the mixers may know of the model."""
    return Sizes(
        d_model=config.d_model,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        d_key=config.d_key,
        d_value=config.d_value,
        n_layers=config.n_layers,
        dtype=config.dtype,
        output_scale=output_scale(config),
        norm_eps=config.norm_eps,
    )


def output_scale(config: ModelConfig) -> float:
    """Returns the scale of what each half-block adds: the residual stream's variance stays O(1)."""
    n_halves = 1 if config.mlp == "none" else 2
    return (n_halves * config.n_layers) ** -0.5


def make_block(config: ModelConfig, mixer: nn.Module) -> Block:
    """Returns the block around a mixer."""
    return Block(
        mixer=mixer,
        mlp=config.mlp,
        d_ff=config.d_ff,
        norm=config.norm,
        dropout=config.dropout,
        layer_drop=config.layer_drop,
        dtype=config.dtype,
        output_scale=output_scale(config),
        n_layers=config.n_layers,
        d_model=config.d_model,
        norm_eps=config.norm_eps,
    )


def make_blocks(config: ModelConfig) -> tuple[Block, ...]:
    """Returns one block a pattern position."""
    kinds = [mixer_kind(config, kind) for kind in config.pattern]
    return tuple(make_block(config, make_mixer(config, kind)) for kind in kinds)


def make_mixer(config: ModelConfig, kind: str) -> nn.Module:
    """Returns the module of a mixer; ValueError if its fields and the model's sizes do not fit."""
    return config.mixers[kind].build(sizes_of(config), config.of(kind))


def mixer_kind(config: ModelConfig, kind: str) -> str:
    """Returns the mixer inside a layer of this kind."""
    return config.memory.mixer if kind == "armt" else kind


def mixers_in_use(config: ModelConfig) -> list[nn.Module]:
    """Returns a module a pattern position, of those that are mixers of the registry."""
    kinds = [mixer_kind(config, kind) for kind in config.pattern]
    return [make_mixer(config, kind) for kind in kinds if kind in config.mixers]


def has_state(config: ModelConfig) -> bool:
    """Returns whether the model has non-gradient state."""
    return any(hasattr(mixer, "update_state") for mixer in mixers_in_use(config))


def is_random(config: ModelConfig) -> bool:
    """Returns whether training draws random numbers."""
    rates = (config.dropout, config.embed_dropout, config.layer_drop)
    if any(rate > 0.0 for rate in rates):
        return True
    return any(getattr(mixer, "is_random", False) for mixer in mixers_in_use(config))


def layer_names(config: ModelConfig) -> list[str]:
    """Returns the parameter subtree's name of each pattern position."""
    return [f"{p}_{kind}" for p, kind in enumerate(config.pattern)]


def init_stack(config: ModelConfig, key: PRNGKey) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Returns stacked parameters and non-gradient state, each layer from its own key.

    Leaves are [n_layers / P, ...]; pattern positions without state are absent from the second.
    """
    example = jnp.zeros((1, 2, config.d_model), config.dtype)
    params, state = {}, {}
    places = layer_places(config)
    for name, block, layers in zip(layer_names(config), make_blocks(config), places, strict=True):

        def init(layer, block=block):
            layer_key = jax.random.fold_in(key, layer)
            return block.init(layer_key, example, None, layer=layer)

        variables = jax.vmap(init)(jnp.asarray(layers))
        params[name] = variables["params"]
        if "model_state" in variables:
            state[name] = variables["model_state"]
    return params, state


def update_stack_state(
    config: ModelConfig, state: dict[str, PyTree], aux: tuple[Aux, ...], key: PRNGKey
) -> dict[str, PyTree]:
    """Returns the non-gradient state after an update whose tokens reported `aux`."""
    updated = {}
    for p, (name, block) in enumerate(zip(layer_names(config), make_blocks(config), strict=True)):
        if name in state:
            position_key = jax.random.fold_in(key, p)
            updated[name] = block.update_state(state[name], aux[p].statistics, position_key)
    return updated


def describe_stack_state(config: ModelConfig, state: dict[str, PyTree]) -> dict[str, jax.Array]:
    """Returns metrics of the non-gradient state, averaged over layers and heads."""
    found: dict[str, list[jax.Array]] = {}
    for name, block in zip(layer_names(config), make_blocks(config), strict=True):
        for metric, value in block.describe_state(state.get(name)).items():
            found.setdefault(metric, []).append(value.ravel())
    return {metric: jnp.mean(jnp.concatenate(values)) for metric, values in found.items()}


def layer_places(config: ModelConfig) -> list[np.ndarray]:
    """Returns the layer numbers, int32 [n_layers / P], of each pattern position."""
    pattern_len = len(config.pattern)
    return [np.arange(p, config.n_layers, pattern_len).astype(np.int32) for p in range(pattern_len)]


def init_stack_cache(config: ModelConfig, batch_size: int, max_len: int) -> tuple[PyTree, ...]:
    """Returns the empty caches, one stacked pytree a pattern position."""
    repeats = config.n_layers // len(config.pattern)

    def stacked(block: Block) -> PyTree:
        cache = block.init_cache(batch_size, max_len)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (repeats, *leaf.shape)), cache)

    return tuple(stacked(block) for block in make_blocks(config))


def apply_stack(
    config: ModelConfig,
    params: dict[str, PyTree],
    state: dict[str, PyTree],
    x: jax.Array,
    documents: Documents | None,
    caches: tuple[PyTree, ...] | None,
    *,
    key: PRNGKey | None,
    train: bool,
) -> tuple[jax.Array, tuple[PyTree, ...] | None, tuple[Aux, ...]]:
    """Runs the stack over [batch, seq, d_model], cut into segments and ordered as config says."""
    places = map(jnp.asarray, layer_places(config))
    stacked = tuple(
        (params[name], state.get(name), at)
        for name, at in zip(layer_names(config), places, strict=True)
    )
    cells = tuple(_make_cell(config, block, train) for block in make_blocks(config))

    def fresh():
        return init_stack_cache(config, x.shape[0], x.shape[1])

    stream = (x, documents)
    return run_segments(config, cells, stacked, stream, caches, key=key, make_caches=fresh)


def run_segments(
    config: ModelConfig,
    cells: tuple[Callable[..., Any], ...],
    stacked: tuple[PyTree, ...],
    stream: tuple[Any, ...],
    caches: tuple[PyTree, ...] | None,
    *,
    key: PRNGKey | None,
    make_caches: Callable[[], tuple[PyTree, ...]],
) -> tuple[jax.Array, tuple[PyTree, ...] | None, tuple[Aux, ...]]:
    """Runs a call through the layers in segments of config.segment_len tokens.

    A last segment shorter than segment_len runs after the others: the split law makes that exact.

    Args:
        cells: one a pattern position, (layer_params, stream, cache[, key]) -> (stream, cache, aux).
        stacked: parameters, one tree a pattern position.
        stream: what travels up the layers: activations [batch, seq, d_model], documents, and what
            else the cells want, leaves [batch, seq, ...].
        caches: stacked; None = nothing came before, and nothing is wanted back.
        key: of dropout.
        make_caches: empty caches, for calls of several segments that keep nothing.

    Returns:
        (activations, caches, aux).
    """
    x, documents, *rest = stream
    seq = x.shape[1]
    segment_len = min(config.segment_len or _default_segment_len(config, seq), seq)
    wanted_back = caches is not None
    before, is_one_segment = caches, segment_len == seq
    if wanted_back and is_one_segment:  # nobody needs the new caches before all layers are done
        caches = lend(caches, stays_whole=seq == 1)
    if caches is None and segment_len < seq:
        caches = make_caches()
        if documents is None:
            documents = Documents(jnp.zeros(x.shape[:2], jnp.int32), None)
    stream = (x, documents, *rest)

    def run(stream, caches, first_segment):
        (y, *_), caches, aux = run_stack(
            cells,
            stacked,
            stream,
            caches,
            key=key,
            first_segment=first_segment,
            **schedule_options(config),
        )
        return y, caches, aux

    y, caches, aux = run_in_segments(run, stream, caches, segment_len)
    if wanted_back and is_one_segment:
        caches = settle(before, caches)
    return y, caches if wanted_back else None, aux


def schedule_options(config: ModelConfig) -> dict[str, Any]:
    """Returns what the config says of `run_stack`'s options."""
    names = ("schedule", "n_ramp_buckets", "unroll", "layer_axis", "sequence_axis")
    return {name: getattr(config, name) for name in names}


def _default_segment_len(config: ModelConfig, seq: int) -> int:
    """The whole call; of a sequence that is spread over devices, the part of one."""
    n_devices = axis_size(config.sequence_axis) if config.sequence_axis else 1
    return seq if seq % n_devices else seq // n_devices


def _make_cell(config: ModelConfig, block: Block, train: bool):
    """The pure function of a layer: ((params, state, place), stream, cache, key) -> it, aux."""

    def cell(layer_params, stream, cache, key=None):
        (params, state, layer), (x, documents) = layer_params, stream
        rngs = {} if key is None else {"dropout": key}
        y, cache, aux = call_module(
            block, params, x, cache, documents, state=state, layer=layer, train=train, rngs=rngs
        )
        return (spread_tokens(y), documents), cache, aux

    return rematerialize(config, cell)


def rematerialize(config: ModelConfig, cell):
    """Returns the cell, recomputed in the backward pass as config.model.remat says."""
    if config.remat == "none":
        return cell
    policies = jax.checkpoint_policies
    keep = {"full": policies.nothing_saveable, "dots": policies.dots_with_no_batch_dims_saveable}
    return jax.checkpoint(cell, policy=keep[config.remat])
