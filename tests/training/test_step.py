"""The update: micro-batches, the carried cache, averages, and the loss in chunks."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from longctx_jax.ops.losses import token_nll
from longctx_jax.training.optimizer import make_optimizer
from longctx_jax.training.state import init_state
from longctx_jax.training.step import make_train_step, merge_cache_rows, split_cache_rows
from tests.helpers import assert_close
from tests.tiny import tiny_config

ROWS, SEQ = 4, 12


def batches(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 256, (ROWS, n * SEQ + 1)).astype(np.int32)
    weights = (rng.random((ROWS, n * SEQ)) < 0.8).astype(np.float32)
    weights[0] = 0.0  # micro-batches of very different token counts
    for i in range(n):
        window = slice(i * SEQ, (i + 1) * SEQ)
        yield {
            "tokens": text[:, :-1][:, window],
            "targets": text[:, 1:][:, window],
            "weights": weights[:, window],
            "segment_ids": np.zeros((ROWS, SEQ), np.int32),
        }


def start(name="transformer", *, cache_len=SEQ, use_ema=False, learning_rate=1e-2, **fields):
    config = tiny_config(model__name=name, optim__learning_rate=learning_rate, **fields)
    model = build_model(config.model)
    tx, _ = make_optimizer(config.optim, 10)
    state = init_state(model, tx, seed=0, batch_size=ROWS, cache_len=cache_len, use_ema=use_ema)
    return model, tx, state


def run(model, tx, state, n=2, **options):
    train_step = make_train_step(model, tx, **options)
    metrics = []
    for batch in batches(n):
        state, m = train_step(state, batch)
        metrics.append({k: float(v) for k, v in m.items()})
    return state, metrics


@pytest.mark.parametrize(
    "options",
    [{"n_microbatches": 2}, pytest.param({"loss_chunk_len": 5}, marks=pytest.mark.slow)],
    ids=str,
)
def test_pieces_do_not_change_the_update(options):
    whole, whole_metrics = run(*start())
    pieces, metrics = run(*start(), **options)
    for a, b in zip(jax.tree.leaves(pieces.params), jax.tree.leaves(whole.params), strict=True):
        assert_close(a, b, rel_rms=1e-5)
    assert metrics[1]["loss"] == pytest.approx(whole_metrics[1]["loss"], rel=1e-6)
    assert metrics[1]["grad_norm"] == pytest.approx(whole_metrics[1]["grad_norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inattention", "transformer"])
def test_the_loss_of_some_positions(name):
    """The same for all rows, drawn anew each update; a third of the tokens count."""
    model, tx, state = start(name, cache_len=0, learning_rate=0.0)
    variables = jax.tree.map(jnp.copy, state.variables)
    _, metrics = run(model, tx, state, n=2, loss_positions=SEQ // 3)
    for batch, m in zip(batches(2), metrics, strict=True):
        nll = token_nll(
            model.apply(variables, batch["tokens"]).logits, jnp.asarray(batch["targets"])
        )
        total, n = (
            np.sum(np.asarray(nll) * batch["weights"], axis=0),
            np.sum(batch["weights"], axis=0),
        )
        draws = itertools.combinations(range(SEQ), SEQ // 3)
        means = [np.sum(total[list(at)]) / np.sum(n[list(at)]) for at in draws]
        assert np.min(np.abs(np.asarray(means) - m["loss"])) < 1e-6 * m["loss"]
    assert metrics[0]["loss"] != metrics[1]["loss"]


@pytest.mark.slow
def test_an_update_whose_draws_do_not_count_has_no_gradient():
    model, tx, state = start("inattention", cache_len=0)
    train_step = make_train_step(model, tx, loss_positions=2)
    for batch in batches(3):
        weights = np.zeros_like(batch["weights"])
        weights[:, 5] = 1.0
        state, metrics = train_step(state, batch | {"weights": weights})
        assert math.isfinite(float(metrics["loss"])) and math.isfinite(float(metrics["grad_norm"]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("name", ["transformer", pytest.param("decay", marks=pytest.mark.slow)])
def test_the_cache_crosses_windows(name):
    model, tx, state = start(name, cache_len=100, learning_rate=0.0)
    variables = jax.tree.map(jnp.copy, state.variables)
    _, metrics = run(model, tx, state, n=3)
    windows = list(batches(3))
    tokens, targets, weights = (
        np.concatenate([w[k] for w in windows], axis=1) for k in ("tokens", "targets", "weights")
    )
    nll = token_nll(model.apply(variables, tokens).logits, jnp.asarray(targets)) * weights
    for i, m in enumerate(metrics):
        window = slice(i * SEQ, (i + 1) * SEQ)
        expected = float(jnp.sum(nll[:, window]) / np.sum(weights[:, window]))
        assert m["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_without_a_carried_cache_every_window_starts_cold():
    model, tx, state = start(cache_len=0, learning_rate=0.0)
    variables = jax.tree.map(jnp.copy, state.variables)
    _, metrics = run(model, tx, state)
    last = list(batches(2))[1]
    logits = model.apply(variables, last["tokens"]).logits
    nll = token_nll(logits, jnp.asarray(last["targets"]))
    expected = float(jnp.sum(nll * last["weights"]) / np.sum(last["weights"]))
    assert metrics[1]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_carried_cache_starts_empty_every_so_many_updates():
    options = {"cold_start_every": 2, "cache_len": 2 * SEQ}
    model, tx, state = start(learning_rate=0.0, cache_len=2 * SEQ)
    variables = jax.tree.map(jnp.copy, state.variables)
    _, metrics = run(model, tx, state, n=4, **options)
    windows = list(batches(4))
    for first in (0, 2):
        tokens = np.concatenate([windows[first]["tokens"], windows[first + 1]["tokens"]], axis=1)
        logits = model.apply(variables, tokens).logits
        for i in range(2):
            batch, part = windows[first + i], logits[:, i * SEQ : (i + 1) * SEQ]
            nll = token_nll(part, jnp.asarray(batch["targets"]))
            expected = float(jnp.sum(nll * batch["weights"]) / np.sum(batch["weights"]))
            assert metrics[first + i]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_average_of_the_weights_lags_behind():
    model, tx, state = start(use_ema=True)
    first = jax.tree.map(np.asarray, state.params)
    after, _ = run(model, tx, state, n=1, ema_decay=0.9)
    table = ("embed", "table")
    old, new, mean = (t[table[0]][table[1]] for t in (first, after.params, after.ema))
    assert_close(mean, 0.1 * old + 0.9 * new, rel_rms=1e-6)  # (1 + step) / (10 + step) at step 0
    assert after.eval_variables["params"] is after.ema


def test_cache_rows_split_and_merge_in_order():
    model, _, state = start(cache_len=5)
    cache = jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape), state.cache)
    halves = split_cache_rows(cache, 2)
    assert halves.document.shape == (2, ROWS // 2)
    back = merge_cache_rows(halves)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(cache), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_dropout_differs_between_steps_and_not_between_runs():
    options = {"model__dropout": 0.5, "optim__learning_rate": 0.0}
    del options["optim__learning_rate"]
    _, first = run(*start(learning_rate=0.0, model__dropout=0.5, cache_len=0), n=1)
    _, again = run(*start(learning_rate=0.0, model__dropout=0.5, cache_len=0), n=1)
    model, tx, state = start(learning_rate=0.0, model__dropout=0.5, cache_len=0)
    train_step = make_train_step(model, tx)
    batch = next(batches(1))
    state, m0 = train_step(state, batch)
    state, m1 = train_step(state, batch)
    assert first == again
    assert float(m0["loss"]) == first[0]["loss"]
    assert float(m1["loss"]) != float(m0["loss"])


@pytest.mark.slow
@pytest.mark.parametrize(("segment_len", "is_written"), [(SEQ, False), (SEQ // 2, True)])
def test_a_mean_of_nothing_is_none(segment_len, is_written):
    """Rows of one segment write nothing into the memory."""
    model, tx, state = start(
        "recurrent_memory", cache_len=0, model__memory__segment_len=segment_len
    )
    _, metrics = make_train_step(model, tx)(state, next(batches(1)))
    gamma = metrics["memory_gamma"]
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(metrics))
    assert (gamma.count > 0) == is_written != math.isnan(float(gamma))


def test_one_compilation_for_all_steps():
    model, tx, state = start()
    train_step = make_train_step(model, tx)
    for batch in batches(3):
        state, _ = train_step(state, batch)
    assert train_step._cache_size() == 1
