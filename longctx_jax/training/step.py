"""One parameter update: loss, gradient, micro-batches, optimizer, averages. Pure functions.

The objective of a step is (sum of token losses + sum of auxiliary losses) / number of tokens, over
the whole batch. Micro-batches add up sums and divide once, so they change memory and not the
gradient.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from longctx_jax.models.decoder import Decoder, ModelCache
from longctx_jax.nn.contract import Mean
from longctx_jax.ops.losses import chunked_token_nll
from longctx_jax.training.state import TrainState
from longctx_jax.typing import PRNGKey, PyTree

Batch = Mapping[str, Any]  # numpy or jax arrays [rows, seq]
Sums = dict[str, Any]  # over the tokens of a batch: nll, tokens (their weights), aux (of the model)
STOP_VOTES = "stop_votes"  # how many devices' processes were asked to stop
STATE_KEY = 2**31 - 1  # folded in for updates of model_state; micro-batches fold in 0, 1, ...
Metrics = dict[str, jax.Array | Mean]  # scalars, each to be read by float()
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def make_train_step(
    model: Decoder,
    tx: optax.GradientTransformation,
    *,
    n_microbatches: int = 1,
    loss_chunk_len: int = 0,
    loss_positions: int = 0,
    ema_decay: float = 0.0,
    cold_start_every: int = 0,
    cache_len: int = 0,
    state_shardings: PyTree = None,
) -> TrainStep:
    """Returns the compiled update (state, batch) -> (state, metrics); the old state is donated.

    Args:
        n_microbatches: pieces the rows of a batch are processed in, one after another.
        loss_chunk_len: tokens whose logits exist at once; 0 = all of a micro-batch.
        loss_positions: tokens a row whose loss counts, drawn anew for each micro-batch and the same
            in its rows; 0 = all. Models that pick outputs spare the others their layers.
        ema_decay: of the average of the weights, 0 = off.
        cold_start_every: updates between two at which a carried cache starts empty; 0 = it never
            does again.
        cache_len: tokens, of the empty cache that takes its place.
        state_shardings: of the state on a mesh of devices, which stays as it is spread; None = one
            device.

    Returns:
        A function of batches with tokens, targets, weights (of the loss, and of what the model
        counts unless model_weights say otherwise), maybe segment_ids. Its metrics are loss
        (nats a token), grad_norm, one entry an auxiliary loss, and one a model metric: a `Mean`,
        which may be of nothing. A third argument, an array of votes, comes back as their sum in the
        metric `STOP_VOTES`.
    """
    rules = _LossRules(loss_chunk_len, loss_positions)

    def train_step(state: TrainState, batch: Batch, votes: jax.Array | None = None):
        key = jax.random.fold_in(state.key, state.step)
        cache = state.cache if isinstance(state.cache, ModelCache) else None
        if cache is not None and cold_start_every:
            empty = model.init_cache(batch["tokens"].shape[0], cache_len)
            cache = _cold_start(cache, empty, state.step % cold_start_every == 0)

        def gradients(batch, cache, index):
            micro_key = jax.random.fold_in(key, index)
            return _gradients(model, rules, state, batch, cache, micro_key)

        if n_microbatches == 1:
            cache, (grads, sums) = gradients(batch, cache, 0)
        else:
            cache, (grads, sums) = _summed(gradients, batch, cache, n_microbatches)
        # With losses of some positions, none of those drawn may count: no gradient, then.
        n_tokens = jnp.where(sums["tokens"] > 0, sums["tokens"], 1.0)
        grads = jax.tree.map(lambda g: g / n_tokens, grads)
        state, metrics = _updated(model, tx, ema_decay, state, grads, sums, cache)
        return state, metrics if votes is None else metrics | {STOP_VOTES: jnp.sum(votes)}

    if state_shardings is None:
        return jax.jit(train_step, donate_argnums=0)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(state_shardings, None))


class _LossRules(NamedTuple):
    """How much of a micro-batch's loss exists at once, and how much counts."""

    chunk_len: int
    n_positions: int


def _loss_sum(
    model: Decoder,
    rules: _LossRules,
    params: PyTree,
    model_state: PyTree,
    batch: Batch,
    cache: ModelCache | None,
    key: PRNGKey,
) -> tuple[jax.Array, tuple[ModelCache | None, Sums]]:
    """Sum of losses over tokens, with everything that is not differentiated."""
    variables = {"params": params, "model_state": model_state}
    targets, weights, at = batch["targets"], batch["weights"], None
    if 0 < rules.n_positions < targets.shape[1]:
        draw_key = jax.random.fold_in(key, STATE_KEY)
        at = jax.random.choice(
            draw_key, targets.shape[1], (rules.n_positions,), replace=False
        ).sort()
        targets, weights = targets[:, at], weights[:, at]
    out = model.hidden(
        variables,
        batch["tokens"],
        cache,
        segment_ids=batch.get("segment_ids"),
        weights=batch.get("model_weights", batch["weights"]),
        rngs={"dropout": key},
        train=True,
        at=at,
    )
    nll = chunked_token_nll(
        out.hidden,
        model.unembedding(variables),
        targets,
        chunk_len=rules.chunk_len,
        weights=weights,
    )
    nll = jnp.sum(nll)
    extra = sum((jnp.sum(loss) for loss in jax.tree.leaves(_losses(out.aux))), start=0.0)
    tokens = jnp.sum(weights)
    return nll + extra, (out.cache, {"nll": nll, "tokens": tokens, "aux": out.aux})


def _gradients(
    model: Decoder,
    rules: _LossRules,
    state: TrainState,
    batch: Batch,
    cache: ModelCache | None,
    key: PRNGKey,
) -> tuple[ModelCache | None, tuple[PyTree, Sums]]:
    """Returns (cache, (gradient of the sum of losses, sums)) of one micro-batch."""
    loss_sum = functools.partial(_loss_sum, model, rules)
    value = jax.value_and_grad(loss_sum, has_aux=True)
    (_, (cache, sums)), grads = value(state.params, state.model_state, batch, cache, key)
    return cache, (grads, sums)


def _summed(
    gradients: Callable[[Any, Any, Any], tuple[Any, tuple[PyTree, Sums]]],
    batch: Batch,
    cache: ModelCache | None,
    n: int,
) -> tuple[ModelCache | None, tuple[PyTree, Sums]]:
    """Returns `gradients(batch, cache, index)` summed over n micro-batches, one after another."""
    micro = jax.tree.map(lambda x: _split(x, n, 0), batch)
    caches = split_cache_rows(cache, n)

    def add(total, inputs):
        index, batch, cache = inputs
        cache, new = gradients(batch, cache, index)
        return jax.tree.map(jnp.add, total, new), cache

    first = jax.tree.map(lambda x: x[0], (micro, caches))
    shapes = jax.eval_shape(lambda pair: gradients(pair[0], pair[1], 0)[1], first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, caches = jax.lax.scan(add, zeros, (jnp.arange(n), micro, caches))
    return merge_cache_rows(caches), total


def _updated(
    model: Decoder,
    tx: optax.GradientTransformation,
    ema_decay: float,
    state: TrainState,
    grads: PyTree,
    sums: Sums,
    cache: ModelCache | None,
) -> tuple[TrainState, Metrics]:
    """Returns the next state and the metrics; the gradient is that of the mean over tokens."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = _average(state.ema, params, state.step, ema_decay) if ema_decay else state.ema
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), STATE_KEY)
    model_state = model.update_model_state(state.model_state, sums["aux"], key)
    metrics = {
        "loss": sums["nll"] / jnp.where(sums["tokens"] > 0, sums["tokens"], 1.0),
        "grad_norm": optax.tree.norm(grads),
        **_named_metrics(sums),
        **model.describe_model_state(model_state),
    }
    state = dataclasses.replace(
        state,
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema=ema,
        model_state=model_state,
        cache=state.cache if cache is None else cache,
    )
    return state, metrics


def _cold_start(cache: ModelCache, empty: ModelCache, is_start: jax.Array) -> ModelCache:
    """Returns the empty cache where a cold start is due, else the carried one."""
    return jax.tree.map(lambda new, old: jnp.where(is_start, new, old), empty, cache)


def _average(ema: PyTree, params: PyTree, step: jax.Array, ema_decay: float) -> PyTree:
    """Returns the average of the weights with the new ones in it."""
    # Early on the average follows the weights instead of remembering their start.
    decay = jnp.minimum(ema_decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, ema, params)


def _losses(aux: Any) -> dict[str, list[jax.Array]]:
    """Auxiliary losses by name; a patterned stack reports one Aux a position."""
    named: dict[str, list[jax.Array]] = {}
    for one in _positions(aux):
        for name, loss in one.losses.items():
            named.setdefault(name, []).append(jnp.sum(loss))
    return named


def _positions(aux: Any) -> list[Any]:
    return list(aux) if isinstance(aux, tuple) else [aux]


def _named_metrics(sums: Sums) -> Metrics:
    n_tokens = jnp.where(sums["tokens"] > 0, sums["tokens"], 1.0)
    losses = {name: sum(x) / n_tokens for name, x in _losses(sums["aux"]).items()}
    means: dict[str, Mean] = {}
    for one in _positions(sums["aux"]):
        for name, mean in one.metrics.items():
            mean = jax.tree.map(jnp.sum, mean)
            means[name] = jax.tree.map(jnp.add, means[name], mean) if name in means else mean
    return {**losses, **means}


def _split(x: jax.Array, n: int, axis: int) -> jax.Array:
    """[..., rows, ...] -> [n, ..., rows / n, ...], consecutive rows together."""
    shape = (*x.shape[:axis], n, x.shape[axis] // n, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


def _merge(x: jax.Array, axis: int) -> jax.Array:
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _map_rows(cache: ModelCache | None, function: Callable[[jax.Array, int], jax.Array]) -> PyTree:
    """Applies function(leaf, row axis): rows are axis 0 but for the layers' caches."""
    if cache is None:
        return None
    layers = jax.tree.map(lambda leaf: function(leaf, cache.row_axis), cache.layers)
    rest = jax.tree.map(lambda leaf: function(leaf, 0), dataclasses.replace(cache, layers=()))
    return dataclasses.replace(rest, layers=layers)


def split_cache_rows(cache: ModelCache | None, n: int) -> PyTree:
    """Returns the cache as n caches of consecutive rows, stacked on a new leading axis."""
    return _map_rows(cache, lambda leaf, axis: _split(leaf, n, axis))


def merge_cache_rows(caches: PyTree) -> ModelCache | None:
    """Inverse of `split_cache_rows`."""
    return _map_rows(caches, _merge)
