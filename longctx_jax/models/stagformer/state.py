"""Parameters, state and caches of time-staggered stacks, and their lanes.

A lane is one stack's share of an array that all stacks have. A stack above another also has an
*upper* lane: what it needs to see that one. The first stack has none, except on several devices,
which all run the same program: there it is idle. Models that decode one stack after the other keep
each stack's caches by themselves, since taking a lane out of an array would copy it.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import init_stack, layer_names, make_blocks, output_scale
from longctx_jax.nn.cross_attention import CrossHalf, RowCache, init_rows
from longctx_jax.nn.kv_cache import KVCache
from longctx_jax.nn.norms import make_norm
from longctx_jax.typing import PRNGKey, PyTree


class LaneCache(NamedTuple):
    """Caches of one pattern position, leaves [rows of the pattern, lanes, batch, ...]."""

    own: PyTree  # of the block
    cross: KVCache | None  # upper lanes; None if cross-attention keeps nothing of its own


class StackCaches(NamedTuple):
    """The caches of all stacks, or of one, which have no axis of lanes."""

    positions: tuple[LaneCache, ...]  # one a pattern position
    ring: RowCache | None  # [1, upper lanes, batch, ...]: memory rows that all layers share


Layers = StackCaches | tuple[StackCaches, ...]  # in lanes, or one a stack


@flax.struct.dataclass
class Handover:
    """What goes from token to token beside the layers' caches."""

    last: jax.Array  # [batch, upper lanes, d_model], newest output of the stack below
    is_started: jax.Array  # bool [batch], whether there is such a token


def stack_config(config: ModelConfig) -> ModelConfig:
    """Returns the config of one stack: its n_layers are those of a stack."""
    return dataclasses.replace(config, n_layers=config.n_layers // config.stagformer.n_stacks)


def n_idle_stacks(config: ModelConfig) -> int:
    """Returns how many stacks have no upper lane."""
    return 0 if config.stagformer.stack_axis else 1


def cross_half(config: ModelConfig) -> CrossHalf:
    """Returns the cross-attention of a layer of an upper stack."""
    stag, softmax = config.stagformer, config.of("softmax")
    return CrossHalf(
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        d_key=config.d_key,
        d_value=config.d_value,
        window_len=stag.cross_window,
        position=stag.cross_position,
        rope_theta=softmax.rope_theta,
        delay=1 if stag.stagger else 0,
        implementation=softmax.implementation,
        norm=config.norm,
        dropout=config.dropout,
        layer_drop=config.layer_drop,
        dtype=config.dtype,
        output_scale=output_scale(stack_config(config)),
        rope_scaling=softmax.rotary_scaling,
        norm_eps=config.norm_eps,
    )


def init_staggered(
    config: ModelConfig, key: PRNGKey
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Returns parameters and non-gradient state.

    Leaves of "stack" are [rows of the pattern, stacks, ...], those of "cross" [rows, stacks - 1,
    ...], both without the second axis if the stacks share them; of the rest [stacks - 1, ...] or
    [stacks, ...].
    """
    stag, one, width = config.stagformer, stack_config(config), config.d_model
    n_stacks = stag.n_stacks
    stack_key, cross_key, first_key = jax.random.split(key, 3)
    if stag.share_weights:
        stack, state = init_stack(one, stack_key)
    else:
        keys = jax.random.split(stack_key, n_stacks)
        stack, state = jax.vmap(lambda k: init_stack(one, k), out_axes=1)(keys)
    example = jnp.zeros((1, 1, width), config.dtype)
    norm = make_norm(config.norm, config.dtype, config.norm_eps).init(first_key, example)["params"]
    handover = {"norm": jax.tree.map(lambda p: jnp.stack([p] * (n_stacks - 1)), norm)}
    if stag.stagger:
        handover["first"] = jax.random.normal(first_key, (n_stacks - 1, width), jnp.float32)
    params: dict[str, PyTree] = {"stack": stack, "handover": handover}
    if stag.handoff == "cross":
        half, n_rows = cross_half(config), one.n_layers // len(one.pattern)
        shape = (n_rows,) if stag.share_weights else (n_rows, n_stacks - 1)

        def init(key):
            return half.init(key, example, example, None, None)["params"]

        params["cross"] = {
            name: jax.vmap(init if stag.share_weights else jax.vmap(init))(
                jax.random.split(jax.random.fold_in(cross_key, p), shape)
            )
            for p, name in enumerate(layer_names(one))
        }
    if stag.combine == "linear":
        params["combine"] = jnp.zeros((n_stacks,), jnp.float32).at[-1].set(1.0)
    return params, state


def decodes_in_lanes(config: ModelConfig) -> bool:
    """Returns whether a token goes through all stacks at once."""
    stag = config.stagformer
    return stag.stagger and stag.decode != "sequential" and not stag.recurrent


def init_caches(config: ModelConfig, batch_size: int, max_len: int) -> tuple[Layers, Handover]:
    """Returns what is remembered before the first token."""
    stag = config.stagformer
    n_upper = stag.n_stacks - n_idle_stacks(config)
    last = jnp.zeros((batch_size, n_upper, config.d_model), config.dtype)
    handover = Handover(last, jnp.zeros((batch_size,), bool))
    one, *others = (_init_one(config, batch_size, max_len) for _ in range(stag.n_stacks))
    if not decodes_in_lanes(config):
        first = StackCaches(tuple(p._replace(cross=None) for p in one.positions), None)
        return (first, *others), handover

    def lanes(tree, n_lanes):
        def spread(leaf):
            return jnp.broadcast_to(leaf[:, None], (leaf.shape[0], n_lanes, *leaf.shape[1:]))

        return jax.tree.map(spread, tree)

    positions = tuple(
        LaneCache(lanes(p.own, stag.n_stacks), lanes(p.cross, n_upper)) for p in one.positions
    )
    return StackCaches(positions, lanes(one.ring, n_upper)), handover


def _init_one(config: ModelConfig, batch_size: int, max_len: int) -> StackCaches:
    """Returns the caches of one upper stack, as `take_lane` does."""
    stag, one = config.stagformer, stack_config(config)

    def stacked(cache, n_rows):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (n_rows, *x.shape)), cache)

    ring, cross = None, None
    n_rows = one.n_layers // len(one.pattern)
    if stag.handoff == "cross" and stag.cross_window != 1:
        if stag.cross_cache == "memory":
            capacity = min(stag.cross_window or max_len, max_len)
            ring = stacked(init_rows(batch_size, capacity, config.d_model, config.dtype), 1)
        else:
            cross = stacked(cross_half(config).init_cache(batch_size, max_len), n_rows)
    positions = tuple(
        LaneCache(stacked(block.init_cache(batch_size, max_len), n_rows), cross)
        for block in make_blocks(one)
    )
    return StackCaches(positions, ring)


def take_lane(config: ModelConfig, caches: Layers, stack: int) -> StackCaches:
    """Returns the caches of one stack: leaves [rows, batch, ...], the ring's [1, batch, ...]."""
    if not isinstance(caches, StackCaches):
        return caches[stack]
    upper = stack - n_idle_stacks(config)

    def take(tree, lane):
        return None if lane < 0 else jax.tree.map(lambda leaf: leaf[:, lane], tree)

    positions = tuple(LaneCache(take(p.own, stack), take(p.cross, upper)) for p in caches.positions)
    return StackCaches(positions, take(caches.ring, upper))


def put_lane(config: ModelConfig, caches: Layers, stack: int, new: StackCaches) -> Layers:
    """Returns the caches with those of one stack replaced."""
    if not isinstance(caches, StackCaches):
        return (*caches[:stack], new, *caches[stack + 1 :])
    upper = stack - n_idle_stacks(config)

    def put(tree, new, lane):
        if lane < 0:
            return tree
        return jax.tree.map(lambda leaf, value: leaf.at[:, lane].set(value), tree, new)

    positions = tuple(
        LaneCache(put(old.own, now.own, stack), put(old.cross, now.cross, upper))
        for old, now in zip(caches.positions, new.positions, strict=True)
    )
    return StackCaches(positions, put(caches.ring, new.ring, upper))
