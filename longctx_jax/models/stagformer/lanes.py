"""One token through staggered stacks at once: stacks are lanes, a batch axis of one loop.

XLA does not run independent products side by side on one device; as a batch axis they are one
launch. Stacks of their own weights become batched products, shared weights one product of
stacks x batch rows, which reads the weights once. On several devices the lanes are split over a
mesh axis: each device keeps its stacks' weights and caches. A token costs two messages of one row:
one to the next device, needed at the next token, and the sum that is the model's output.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import call_module, layer_names, layer_places, make_blocks
from longctx_jax.models.stagformer.state import (
    LaneCache,
    Layers,
    StackCaches,
    cross_half,
    n_idle_stacks,
    stack_config,
)
from longctx_jax.nn.contract import Aux, Documents
from longctx_jax.nn.cross_attention import extend_rows
from longctx_jax.nn.ring_lending import lend, settle
from longctx_jax.typing import PyTree


def run_lanes(
    config: ModelConfig,
    params: dict[str, PyTree],
    state: dict[str, PyTree],
    x: jax.Array,
    memory: jax.Array,
    documents: Documents | None,
    caches: StackCaches,
    weights: jax.Array | None,
) -> tuple[jax.Array, jax.Array, StackCaches, tuple[Aux, ...]]:
    """Runs one token through every stack.

    Args:
        params: as made by `init_staggered`, or by `place_stacks`.
        state: non-gradient state.
        x: what each stack starts from, [stacks, batch, 1, d_model].
        memory: what each upper lane sees newest, [upper lanes, batch, 1, d_model].
        documents: of the token.
        caches: of all stacks.
        weights: of the stacks' outputs in the model's, [stacks]; None = the last is the model's.

    Returns:
        (output [batch, 1, d_model], outputs of the stacks below the upper lanes, [upper lanes,
        batch, 1, d_model], caches, aux).
    """
    one, stag = stack_config(config), config.stagformer
    is_cross = stag.handoff == "cross"
    cross = _padded(config, params)["cross"] if is_cross else {}
    rows = tuple(
        (params["stack"][name], state.get(name), cross.get(name), jnp.asarray(at))
        for name, at in zip(layer_names(one), layer_places(one), strict=True)
    )
    run = functools.partial(_run, config)
    if stag.stack_axis:
        run = _over_devices(config)
    stacks = jnp.arange(stag.n_stacks)
    y, below, caches, aux = run(rows, stacks, x, memory, documents, caches, weights)
    if stag.share_weights:
        aux = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=1), aux)
    return y, below, caches, aux


def combined(weights: jax.Array | None, outputs: jax.Array) -> jax.Array:
    """Returns the weighted sum over the leading axis, in the dtype of outputs; None = the last."""
    if weights is None:
        return outputs[-1]
    wide = jnp.promote_types(outputs.dtype, jnp.float32)
    return jnp.einsum("s,sbtd->btd", weights.astype(wide), outputs.astype(wide)).astype(
        outputs.dtype
    )


def _run(config, rows, stacks, x, memory, documents, caches: StackCaches, weights):
    """The loop over layers, for the stacks of one device; `below` lacks what others hand over."""
    n_idle, stag = n_idle_stacks(config), config.stagformer
    blocks, half = make_blocks(stack_config(config)), cross_half(config)
    lane = None if stag.share_weights else 0
    is_upper = (stacks[n_idle:] > 0)[:, None, None, None]
    ring = jax.tree.map(lambda leaf: leaf[0], caches.ring)
    if stag.handoff == "add":
        x = x.at[n_idle:].add(jnp.where(is_upper, memory, 0))
    elif ring is not None:
        ring = jax.vmap(lambda ring, rows: extend_rows(ring, rows, documents))(ring, memory)

    def layer(block, layer_params, x, cache: LaneCache):
        params, state, cross, at = layer_params

        def mix(params, state, x, cache):
            return call_module(
                block, params, x, cache, documents, state=state, layer=at, method="mix"
            )

        def attend(cross, x, memory, cache):
            return call_module(half, cross, x, memory, cache, documents)

        def feed(params, x, cache):
            return call_module(block, params, x, cache, documents, layer=at, method="feed")

        own, kept = cache
        x, own, aux = jax.vmap(mix, in_axes=(lane, lane, 0, 0))(params, state, x, own)
        if stag.handoff == "cross":
            before = x[n_idle:]
            seen = kept if ring is None else ring
            after, seen = jax.vmap(attend, in_axes=(lane, 0, 0, 0))(cross, before, memory, seen)
            x = jnp.concatenate([x[:n_idle], jnp.where(is_upper, after, before)])
            kept = seen if ring is None else None
        x, own = jax.vmap(feed, in_axes=(lane, 0, 0))(params, x, own)
        return x, LaneCache(own, kept), aux

    def row(x, inputs):
        new, auxes = [], []
        for block, layer_params, cache in zip(blocks, *inputs, strict=True):
            x, cache, aux = layer(block, layer_params, x, cache)
            new.append(cache)
            auxes.append(aux)
        return x, (tuple(new), tuple(auxes))

    lent = (rows, lend(caches.positions))
    y, (new, aux) = jax.lax.scan(row, x, lent, unroll=config.unroll)
    positions = settle(caches.positions, new)
    if ring is not None:
        ring = jax.tree.map(lambda leaf: leaf[None], ring.after)
    below = y[:-1] if n_idle else y
    return combined(weights, y), below, StackCaches(positions, ring), aux


def _over_devices(config: ModelConfig):
    """Returns `_run` with the lanes split over the mesh axis config.model.stagformer.stack_axis."""
    axis = config.stagformer.stack_axis
    n_devices = axis_size(config, jax.sharding.get_abstract_mesh())
    ring = [(d, (d + 1) % n_devices) for d in range(n_devices)]

    def run(*args):
        y, outputs, caches, aux = _run(config, *args)
        handed = jax.lax.ppermute(outputs[-1], axis, ring)  # to the stack above, for the next token
        below = jnp.concatenate([handed[None], outputs[:-1]])
        return jax.lax.psum(y, axis), below, caches, aux

    lanes, later, whole = PartitionSpec(axis), PartitionSpec(None, axis), PartitionSpec()
    stack = whole if config.stagformer.share_weights else later

    def mapped(rows, *args):
        row_specs = tuple((stack, stack, stack, whole) for _ in rows)
        return jax.shard_map(
            run,
            in_specs=(row_specs, lanes, lanes, lanes, whole, later, lanes),
            out_specs=(whole, lanes, later, later),
            axis_names={axis},
            check_vma=False,  # mixers start scans from constants, which vary over no axis
        )(rows, *args)

    return mapped


def axis_size(config: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of devices that share the stacks.

    Raises:
        ValueError: no such mesh axis, or it does not divide the stacks.
    """
    axis, n_stacks = config.stagformer.stack_axis, config.stagformer.n_stacks
    if axis not in mesh.axis_names:
        raise ValueError(
            f"config.model.stagformer.stack_axis must be an axis of the mesh: got {axis!r} and "
            f"{mesh.axis_names}; run inside `with jax.set_mesh(mesh)`"
        )
    if n_stacks % mesh.shape[axis]:
        raise ValueError(
            f"the mesh axis {axis!r} must divide config.model.stagformer.n_stacks: got "
            f"{mesh.shape[axis]} devices and {n_stacks} stacks; choose a divisor"
        )
    return mesh.shape[axis]


def keep_split(config: ModelConfig, caches: Layers) -> Layers:
    """Returns the caches with the lanes where their stacks are, also after a prefill."""
    spec = PartitionSpec(None, config.stagformer.stack_axis)
    return jax.lax.with_sharding_constraint(caches, spec)


def _padded(config: ModelConfig, params: dict[str, PyTree]) -> dict[str, PyTree]:
    """Returns parameters whose cross-attention has a lane for every upper lane of the caches."""
    stag = config.stagformer
    n_upper = stag.n_stacks - n_idle_stacks(config)
    if stag.share_weights or "cross" not in params:
        return params

    def pad(leaf):
        missing = n_upper - leaf.shape[1]
        return jnp.pad(leaf, [(0, 0), (missing, 0)] + [(0, 0)] * (leaf.ndim - 2))

    return {**params, "cross": jax.tree.map(pad, params["cross"])}


def place_stacks(config: ModelConfig, variables: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Returns the variables laid out for decoding on a mesh: each device has its own stacks'.

    Embedding, output matrix and shared weights are on every device. With several processes each
    must hold the same variables; `apply` also takes those not placed, and moves them at every call.

    Args:
        config: of the model, with stagformer.stack_axis set.
        variables: as made by `Decoder.init`.
        mesh: with that axis.

    Raises:
        ValueError: no such mesh axis, or it does not divide the stacks.
    """
    axis = config.stagformer.stack_axis
    axis_size(config, mesh)
    params = _padded(config, variables["params"])
    split = PartitionSpec() if config.stagformer.share_weights else PartitionSpec(None, axis)

    def place(tree, spec):
        return jax.device_put(tree, NamedSharding(mesh, spec))

    placed = {
        name: place(part, split if name in ("stack", "cross") else PartitionSpec())
        for name, part in params.items()
    }
    return {"params": placed, "model_state": place(variables["model_state"], split)}
