"""Codebooks are state without a gradient: moved once an update by what all its tokens counted."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from longctx_jax.models import build_model
from longctx_jax.ops.vq.codebook import code_statistics, update_codebook
from longctx_jax.training.optimizer import make_optimizer
from longctx_jax.training.state import init_state
from longctx_jax.training.step import make_train_step
from tests.helpers import assert_close, assert_trees_close
from tests.tiny import PROJECT, tiny_config

ROWS, SEQ = 8, 12
FIELDS = {
    "model__name": "transformer_vq",
    "model__vocab_size": 11,
    "model__vq__codebook_size": 5,
    "model__vq__window_len": 4,
    "model__vq__codebook_decay": 0.75,
    "model__vq__commitment": 0.5,
    "optim__learning_rate": 1e-2,
}


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 11, (ROWS, SEQ + 1)).astype(np.int32)
    weights = (rng.random((ROWS, SEQ)) < 0.7).astype(np.float32)
    weights[0] = 0.0
    return {"tokens": text[:, :-1], "targets": text[:, 1:], "weights": weights}


def start(**fields):
    config = tiny_config(**{**FIELDS, **fields})
    model = build_model(config.model)
    tx, _ = make_optimizer(config.optim, 10)
    state = init_state(model, tx, seed=0, batch_size=ROWS, cache_len=0, use_ema=False)
    return model, tx, state


def update(model, tx, state, batch, **options):
    state, metrics = make_train_step(model, tx, **options)(state, batch)
    return state, {name: float(value) for name, value in metrics.items()}


@functools.cache
def one_update():
    """Returns the variables before and after one update, and its metrics."""
    model, tx, state = start()
    before = jax.tree.map(np.array, state.variables)
    after, metrics = update(model, tx, state, make_batch())
    return model, before, jax.tree.map(np.array, after.variables), metrics


def codebooks(variables):
    return variables["model_state"]["stack"]["0_vq"]["mixer"]["codebook"]


def test_an_update_is_the_closed_form():
    """One layer: its keys follow from the embedding, so the statistics can be made by hand."""
    model, before, after, _ = one_update()
    batch = make_batch()
    params = before["params"]
    mixer = jax.tree.map(lambda x: x[0], params["stack"]["0_vq"])
    x = params["embed"]["table"][batch["tokens"]]

    def rms(x):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)

    key = rms(x) * mixer["mixer_norm"]["scale"] @ mixer["mixer"]["key"]["kernel"]
    key = rms(key.reshape(ROWS, SEQ, 2, 8)) * 8**-0.25
    old = jax.tree.map(lambda x: x[0], codebooks(before))
    words = old.sums / old.counts[..., None]
    codes = ((key[..., None, :] - words) ** 2).sum(-1).argmin(-1)
    weights = jnp.asarray(batch["weights"])
    statistics = code_statistics(jnp.asarray(key), jnp.asarray(codes, jnp.int32), 5, weights)
    expected = update_codebook(old, statistics, decay=0.75)
    assert_trees_close(jax.tree.map(lambda x: x[0], codebooks(after)), expected, rel_rms=1e-5)


def test_padding_does_not_count():
    _, before, after, _ = one_update()
    added = codebooks(after).counts - 0.75 * codebooks(before).counts
    counted = make_batch()["weights"].sum()
    assert_close(added.sum(-1), np.full((1, 2), 0.25 * counted), rel_rms=1e-5)


@pytest.mark.slow
def test_model_weights_say_what_counts_where_the_loss_is_asked_little():
    model, tx, state = start()
    before = jax.tree.map(np.array, state.variables)
    batch = make_batch()
    after, metrics = update(
        model, tx, state, batch | {"model_weights": np.ones((ROWS, SEQ), np.float32)}
    )
    added = codebooks(after.variables).counts - 0.75 * codebooks(before).counts
    assert_close(added.sum(-1), np.full((1, 2), 0.25 * ROWS * SEQ), rel_rms=1e-5)
    assert metrics["loss"] == pytest.approx(one_update()[3]["loss"], rel=1e-5)


def test_the_optimizer_does_not_touch_codebooks():
    """Gradient clipping, weight decay and rates act on parameters, which have no codebook."""
    _, before, _, _ = one_update()
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(before["params"])]
    assert names and not any("codebook" in name for name in names)


def test_metrics_of_the_codebook():
    _, _, after, metrics = one_update()
    counts = codebooks(after).counts[0]
    share = counts / counts.sum(-1, keepdims=True)
    perplexity = np.exp(-(share * np.log(share)).sum(-1)).mean()
    assert metrics["vq_perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert metrics["vq_dead_fraction"] == pytest.approx(np.mean(counts < 1.0))
    assert 0 < metrics["vq_relative_error"] < 2 and metrics["vq_commitment"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("n_microbatches", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_gradient_accumulation_is_one_update(n_microbatches):
    model, tx, state = start()
    pieces, metrics = update(model, tx, state, make_batch(), n_microbatches=n_microbatches)
    _, _, whole, whole_metrics = one_update()
    assert_trees_close(pieces.variables, whole, rel_rms=1e-5)
    assert metrics == pytest.approx(whole_metrics, rel=1e-4)


def check_eight_devices():
    """What `test_eight_devices_are_one` runs in a process of its own."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model, tx, state = start()
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    batch = jax.device_put(make_batch(), NamedSharding(mesh, PartitionSpec("data")))
    sharded, metrics = update(model, tx, state, batch)
    _, _, whole, whole_metrics = one_update()
    assert_trees_close(sharded.variables, whole, rel_rms=1e-5)
    assert metrics == pytest.approx(whole_metrics, rel=1e-4)


@pytest.mark.slow
def test_eight_devices_are_one():
    program = "from tests.training import test_codebook_updates as t; t.check_eight_devices()"
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_segments_of_a_schedule_are_one_update():
    """Cut into segments that do not divide the window, in another order: the same update."""
    fields = {"model__segment_len": 5, "model__schedule": "diagonal", "model__n_layers": 2}
    whole_model, tx, state = start(model__n_layers=2)
    expected, whole_metrics = update(whole_model, tx, state, make_batch())
    model, tx, state = start(**fields)
    actual, metrics = update(model, tx, state, make_batch())
    assert_trees_close(actual.variables, expected.variables, rel_rms=2e-5)
    assert metrics == pytest.approx(whole_metrics, rel=1e-4)


@pytest.mark.slow
def test_a_fixed_codebook_stays():
    model, tx, state = start(model__vq__codebook_decay=1.0)
    before = jax.tree.map(np.array, state.model_state)
    after, _ = update(model, tx, state, make_batch())
    assert_trees_close(after.model_state, before, rel_rms=0.0)


@pytest.mark.slow
def test_dead_codes_are_replaced():
    model, tx, state = start(model__vq__reseed_below=1.0, model__vq__codebook_size=40)
    after, metrics = update(model, tx, state, make_batch())
    plain, plain_metrics = update(*start(model__vq__codebook_size=40), make_batch())
    counts, before = codebooks(after.variables).counts, codebooks(plain.variables).counts
    lost = before.sum(-1) - counts.sum(-1)  # what the dead codes still had
    n_replaced = (np.sort(counts) != np.sort(before)).sum(-1) / 2
    assert (n_replaced > 0).all() and (lost >= 0).all() and (lost <= 40 * 0.75).all()
    assert (np.max(counts, -1) < np.max(before, -1)).all()
    assert metrics["vq_perplexity"] > plain_metrics["vq_perplexity"]
    assert metrics["loss"] == plain_metrics["loss"]


def test_layers_have_codebooks_of_their_own():
    model, _, state = start(model__n_layers=2)
    codebook = codebooks(state.variables)
    assert codebook.sums.shape == (2, 2, 5, 8)
    assert not np.allclose(codebook.sums[0], codebook.sums[1])
