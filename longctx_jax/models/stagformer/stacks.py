"""Time-staggered stacks: each starts from the embedding and sees the one below one token late.

    M^s[:, 0] = b^s,   M^s[:, j] = H^(s-1)[:, j - 1]     what stack s may see from token j on
    H^s = stack_s(X0, norm_s(M^s))                       cross-attention in every layer

Nothing that stack s makes of a token is read by stack s + 1 at that token, so a decode step runs
all stacks at once (`lanes.py`). Training and prefill run one stack after the other, each in
parallel over tokens.

Source: Cutler et al. (2025), arXiv 2501.15665; handoff "add": Wu et al. (2025), arXiv 2510.24824.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import (
    call_module,
    layer_names,
    layer_places,
    make_blocks,
    rematerialize,
    run_segments,
)
from longctx_jax.models.stagformer import lanes
from longctx_jax.models.stagformer.state import (
    Handover,
    LaneCache,
    Layers,
    StackCaches,
    cross_half,
    decodes_in_lanes,
    init_caches,
    n_idle_stacks,
    put_lane,
    stack_config,
    take_lane,
)
from longctx_jax.nn.blocks import Block
from longctx_jax.nn.contract import Aux, Documents
from longctx_jax.nn.cross_attention import CrossHalf, MemoryRing, extend_rows
from longctx_jax.nn.norms import make_norm
from longctx_jax.ops.quarantine import find_poison, is_bad
from longctx_jax.typing import PRNGKey, PyTree

Caches = tuple[Layers, Handover]


def apply_staggered(
    config: ModelConfig,
    params: dict[str, PyTree],
    state: dict[str, PyTree],
    x: jax.Array,
    documents: Documents | None,
    caches: Caches | None,
    *,
    norm: Callable[[jax.Array], jax.Array],
    key: PRNGKey | None,
    train: bool,
) -> tuple[jax.Array, Caches | None, tuple[Aux, ...]]:
    """Runs all stacks over the embeddings [batch, seq, d_model] and returns the output, normed.

    Args:
        params: as made by `init_staggered`.
        state: likewise.
        caches: None = nothing came before, and nothing is wanted back.
        norm: after the last layer.
    """
    stag = config.stagformer
    step = caches if x.shape[1] == 1 and not train else None  # of decoding
    if stag.stack_axis:
        lanes.axis_size(config, jax.sharding.get_abstract_mesh())
    if step is not None and stag.recurrent:
        y, caches, aux = _last_stack_alone(config, params, state, x, documents, step)
    elif step is not None and decodes_in_lanes(config):
        y, caches, aux = _in_lanes(config, params, state, x, documents, step)
    else:
        outputs, caches, aux = _stack_after_stack(
            config, params, state, x, documents, caches, key=key, train=train
        )
        y = lanes.combined(output_weights(config, params), jnp.stack(outputs))
    if stag.stack_axis and caches is not None:
        caches = lanes.keep_split(config, caches[0]), caches[1]
    return norm(y), caches, aux


def output_weights(config: ModelConfig, params: dict[str, PyTree]) -> jax.Array | None:
    """Returns alpha [stacks] of the sum of outputs that is the model's; None = it is the last.

    Several devices add up what each has, whatever it counts.
    """
    if config.stagformer.combine == "linear":
        return params["combine"]
    if not config.stagformer.stack_axis:
        return None
    return jnp.zeros((config.stagformer.n_stacks,)).at[-1].set(1.0)


def _stack_after_stack(config, params, state, x, documents, caches: Caches | None, *, key, train):
    """Every stack over all tokens of the call; returns their outputs, [batch, seq, d] each."""
    outputs, auxes = [], []
    layers: Any = None if caches is None else caches[0]
    handover = None if caches is None else caches[1]
    for s in range(config.stagformer.n_stacks):
        memory = None
        if s > 0:
            last = None if handover is None else handover.last[:, s - n_idle_stacks(config)]
            below = outputs[-1]
            memory = delayed(config, params, s - 1, below, documents, last, handover)
        cell_key = None if key is None else jax.random.fold_in(key, s)
        y, layers, aux = _one_stack(
            config, params, state, s, x, memory, documents, layers, cell_key, train
        )
        if s > 0 and documents is not None:
            y = find_poison(is_bad(outputs[-1]), documents.reset).spread(y)
        outputs.append(y)
        auxes.append(aux)
    if handover is not None:
        below = [outputs[max(0, s - 1)] for s in range(n_idle_stacks(config), len(outputs))]
        last = jnp.stack([y[:, -1] for y in below], axis=1)
        handover = Handover(last, jnp.ones_like(handover.is_started))
    after = None if handover is None else (layers, handover)
    return outputs, after, _merge_aux(config, auxes)


def _last_stack_alone(config, params, state, x, documents, caches: Caches):
    """The recurrent approximation of shared weights: the last pass sees its own earlier outputs."""
    s = config.stagformer.n_stacks - 1
    upper = s - n_idle_stacks(config)
    layers, handover = caches
    memory = delayed(config, params, s - 1, None, documents, handover.last[:, upper], handover)
    y, layers, aux = _one_stack(config, params, state, s, x, memory, documents, layers, None, False)
    last = handover.last.at[:, upper].set(y[:, -1])
    return y, (layers, Handover(last, jnp.ones_like(handover.is_started))), aux


def _in_lanes(config, params, state, x, documents, caches: Caches):
    """One token through all stacks at once."""
    layers, handover = caches
    if not isinstance(layers, StackCaches):
        raise ValueError(
            "a cache must be the decoding model's own: got one of a model that decodes one stack "
            "after the other; make it with this model's init_cache"
        )
    n_stacks, n_idle = config.stagformer.n_stacks, n_idle_stacks(config)

    def see(stack, last):
        return delayed(config, params, jnp.maximum(stack - 1, 0), None, documents, last, handover)

    upper = jnp.arange(n_idle, n_stacks)
    memory = jax.vmap(see)(upper, jnp.moveaxis(handover.last, 1, 0))
    start = jnp.broadcast_to(x, (n_stacks, *x.shape))
    weights = output_weights(config, params)
    y, below, layers, aux = lanes.run_lanes(
        config, params, state, start, memory, documents, layers, weights
    )
    handover = Handover(jnp.moveaxis(below[:, :, 0], 0, 1), jnp.ones_like(handover.is_started))
    return y, (layers, handover), aux


def delayed(
    config: ModelConfig,
    params: dict[str, PyTree],
    below,
    output: jax.Array | None,
    documents: Documents | None,
    last: jax.Array | None,
    handover: Handover | None,
) -> jax.Array:
    """Returns the memory M [batch, seq, d_model] of the stack above `below`, normed.

    Args:
        below: index of a stack, may be traced.
        output: its output for the tokens of the call; None: there is one token, and `last` is all
            that is seen.
        last: its output for the token before, [batch, d_model]; None = there was none.
        handover: of the call before; None = there was none.
    """
    stag, own = config.stagformer, params["handover"]
    norm = make_norm(config.norm, config.dtype, config.norm_eps)
    norm_params = jax.tree.map(lambda leaf: leaf[below], own["norm"])
    if not stag.stagger:
        return call_module(norm, norm_params, output)
    if last is None:
        assert output is not None
        last = jnp.zeros_like(output[:, 0])
    rows = last[:, None]
    if output is not None:
        rows = jnp.concatenate([rows, output[:, :-1]], axis=1)
    is_first = jnp.zeros(rows.shape[:2], bool)
    is_first = is_first.at[:, 0].set(True if handover is None else ~handover.is_started)
    if documents is not None and documents.reset is not None:
        is_first |= documents.reset
    first = own["first"][below]
    rows = jnp.where(is_first[..., None], first.astype(rows.dtype), rows)
    if documents is not None:  # what is kept must be finite: other documents weigh it with 0
        rows = jnp.where(is_bad(rows)[..., None], jnp.zeros((), rows.dtype), rows)
    return call_module(norm, norm_params, rows)


def _one_stack(
    config, params, state, s: int, x, memory, documents, layers, key, train: bool
) -> tuple[jax.Array, Any, Any]:
    """Runs stack s under config.model.schedule over the whole call, with the caches of its lane."""
    one, stag = stack_config(config), config.stagformer
    own = None if layers is None else take_lane(config, layers, s)
    caches = None if own is None else own.positions
    ring = None if own is None else own.ring
    half = None
    if memory is not None and stag.handoff == "add":
        x, memory = x + memory, None
    elif memory is not None:
        half = cross_half(config)
    rings = None
    if memory is not None and ring is not None:
        first = jax.tree.map(lambda leaf: leaf[0], ring)
        rings = extend_rows(first, memory, documents)
        ring = jax.tree.map(lambda leaf: leaf[None], rings.after)

    def take(tree, lane):
        return tree if stag.share_weights else jax.tree.map(lambda leaf: leaf[:, lane], tree)

    cross = {} if half is None else params["cross"]
    upper = s - stag.n_stacks  # counted from the end: padded or not, the last lane is the last
    stacked = tuple(
        (
            take(params["stack"][name], s),
            take(state.get(name), s),
            take(cross.get(name), upper),
            jnp.asarray(at),
        )
        for name, at in zip(layer_names(one), layer_places(one), strict=True)
    )
    cells = tuple(_make_cell(one, block, half, rings, train) for block in make_blocks(one))

    def fresh():
        return take_lane(config, init_caches(config, *x.shape[:2])[0], s).positions

    stream = (x, documents, memory)
    y, caches, aux = run_segments(one, cells, stacked, stream, caches, key=key, make_caches=fresh)
    if layers is not None and caches is not None:
        layers = put_lane(config, layers, s, StackCaches(caches, ring))
    return y, layers, aux


def _make_cell(
    config: ModelConfig, block: Block, half: CrossHalf | None, ring: MemoryRing | None, train: bool
):
    """The pure function of a layer: mixer, cross-attention (upper stacks), MLP."""

    def cell(layer_params, stream, cache, key=None):
        (params, state, cross, layer), (x, documents, memory) = layer_params, stream
        own, kept = (None, None) if cache is None else cache
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        rngs = [{} if k is None else {"dropout": k} for k in keys]
        options = {"state": state, "layer": layer, "train": train}
        x, own, aux = call_module(
            block, params, x, own, documents, method="mix", rngs=rngs[0], **options
        )
        if half is not None:
            rows = kept if ring is None else ring
            x, rows = call_module(
                half, cross, x, memory, rows, documents, train=train, rngs=rngs[1]
            )
            kept = rows if ring is None else None
        x, own = call_module(
            block, params, x, own, documents, method="feed", rngs=rngs[2], **options
        )
        return (x, documents, memory), None if cache is None else LaneCache(own, kept), aux

    return rematerialize(config, cell)


def _merge_aux(config: ModelConfig, auxes: list[tuple[Aux, ...]]) -> tuple[Aux, ...]:
    """Shared weights have one state, which all passes feed; else a new axis 1 counts the stacks."""
    if config.stagformer.share_weights:
        return jax.tree.map(lambda *leaves: sum(leaves), *auxes)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *auxes)
