"""What a segment-recurrent stack is made of: layers, parameters, and the state between calls."""

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.recurrent_memory.cells import LayerCache, MemoryLayer, TokenCache
from longctx_jax.models.stack import layer_names, make_blocks, mixer_kind
from longctx_jax.nn.memory import EMPTY
from longctx_jax.typing import PRNGKey, PyTree


@flax.struct.dataclass
class SegmentCache:
    """Where the stream stands in its segment, and RMT's memory."""

    position: jax.Array  # int32 [batch], tokens of the unfinished segment; the same in all rows
    memory: Any  # TokenCache; () unless the kind is "rmt"


class State(NamedTuple):
    """What goes from call to call."""

    layers: tuple[LayerCache, ...]  # one a pattern position, leaves [layers, batch, ...]
    segment: SegmentCache


def make_layers(config: ModelConfig, train: bool = False) -> tuple[MemoryLayer, ...]:
    """Returns one layer a pattern position."""
    pairs = zip(config.pattern, make_blocks(config), strict=True)
    return tuple(MemoryLayer(config, kind, block, train) for kind, block in pairs)


def init_recurrence(config: ModelConfig, key: PRNGKey) -> PyTree:
    """Returns the parameters beside those of the stack: {"layers", and "tokens" of the model}.

    Memory tokens start like embeddings that enter the stack.
    """
    layers = {}
    for p, (name, layer) in enumerate(zip(layer_names(config), make_layers(config), strict=True)):
        position_key = jax.random.fold_in(key, p)
        keys = jax.random.split(position_key, config.n_layers // len(config.pattern))
        layers[name] = jax.vmap(layer.init_params)(keys)
    params: dict[str, PyTree] = {"layers": layers}
    if config.recurrence != "layerwise":
        scale = config.embed_scale * config.d_model**-0.5
        shape = (config.memory.n_memory_tokens, config.d_model)
        tokens_key = jax.random.fold_in(key, 2**31 - 1)
        params["tokens"] = scale * jax.random.normal(tokens_key, shape, jnp.float32)
    return params


def backbone_config(config: ModelConfig) -> ModelConfig:
    """Returns the config of the model without its memory."""
    pattern = tuple(mixer_kind(config, kind) for kind in config.pattern)
    return dataclasses.replace(config, name="transformer", pattern=pattern)


def add_memory(
    config: ModelConfig, fresh: dict[str, PyTree], backbone: dict[str, PyTree]
) -> dict[str, PyTree]:
    """Returns the variables of a backbone with the memory of `fresh` around them.

    An ARMT's memory starts without any effect (W_v = 0), so the result computes, within a segment,
    what the backbone computed.

    Args:
        fresh: variables of the model with memory.
        backbone: variables of the model that `backbone_config` describes.
    """
    names = zip(layer_names(backbone_config(config)), layer_names(config), strict=True)
    names = dict(names)

    def rename(tree):
        return {names[name]: layer for name, layer in tree.items()}

    params = backbone["params"]
    params = {**params, "stack": rename(params["stack"]), "memory": fresh["params"]["memory"]}
    state = backbone["model_state"]
    state = {"stack": rename(state["stack"])} if state else {}
    return {"params": params, "model_state": state}


def init_state(config: ModelConfig, batch_size: int, max_len: int) -> State:
    """Returns the state before the first token."""
    repeats = config.n_layers // len(config.pattern)

    def stacked(layer: MemoryLayer) -> LayerCache:
        inner = layer.init_inner(batch_size, max_len)
        cache = LayerCache(inner, layer.init_memory(batch_size))
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (repeats, *leaf.shape)), cache)

    memory: Any = ()
    if config.recurrence == "rmt":
        shape = (batch_size, config.memory.n_memory_tokens, config.d_model)
        none = jnp.full((batch_size,), EMPTY, jnp.int32)
        memory = TokenCache(jnp.zeros(shape, config.dtype), none)
    position = jnp.zeros((batch_size,), jnp.int32)
    return State(tuple(map(stacked, make_layers(config))), SegmentCache(position, memory))
