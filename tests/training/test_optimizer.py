"""Learning-rate schedules by their values at marked steps; which leaves decay and Muon act on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from longctx_jax.training.optimizer import OPTIMIZERS, is_matrix, make_optimizer, make_schedule


def optim(**fields):
    config = base.get_config().optim
    config.update({"learning_rate": 1.0, "warmup_steps": 10, "final_fraction": 0.1} | fields)
    return config


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # step: value
        ("cosine", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1, 200: 0.1}),
        ("linear", {0: 0.1, 9: 1.0, 10: 1.0, 55: 0.55, 100: 0.1, 200: 0.1}),
        ("constant", {0: 0.1, 9: 1.0, 50: 1.0, 200: 1.0}),
        ("wsd", {0: 0.1, 9: 1.0, 50: 1.0, 80: 1.0, 90: 0.55, 100: 0.1, 200: 0.1}),
    ],
)
def test_schedule_values(name, expected):
    schedule = make_schedule(optim(schedule=name, decay_fraction=0.2), 100)
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(step), value, atol=1e-6, err_msg=f"step {step}")


def test_no_warmup_starts_at_the_peak():
    assert float(make_schedule(optim(schedule="linear", warmup_steps=0), 100)(0)) == 1.0


def params():
    return {
        "stack": {
            "0_softmax": {
                "query": {"kernel": jnp.ones((2, 4, 4))},
                "norm": {"scale": jnp.ones((2, 4))},
            }
        },
        "embed": {"table": jnp.ones((8, 4))},
    }


@pytest.mark.slow
def test_decay_acts_on_stacked_matrices_only():
    mask = is_matrix(params())
    assert mask["stack"]["0_softmax"]["query"]["kernel"]
    assert not mask["stack"]["0_softmax"]["norm"]["scale"]
    assert not mask["embed"]["table"]
    tx, _ = make_optimizer(optim(name="adamw", schedule="constant", weight_decay=0.1), 10)
    zero = jax.tree.map(jnp.zeros_like, params())
    updates, _ = tx.update(zero, tx.init(params()), params())
    assert float(updates["stack"]["0_softmax"]["query"]["kernel"][0, 0, 0]) < 0
    assert float(jnp.abs(updates["embed"]["table"]).max()) == 0
    assert float(jnp.abs(updates["stack"]["0_softmax"]["norm"]["scale"]).max()) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends(name):
    tx, _ = make_optimizer(
        optim(name=name, schedule="constant", learning_rate=0.02, warmup_steps=0, weight_decay=0.0),
        50,
    )

    def loss(p):
        return sum(jnp.sum((x - 0.5) ** 2) for x in jax.tree.leaves(p))

    @jax.jit
    def step(p, s):
        updates, s = tx.update(jax.grad(loss)(p), s, p)
        return optax.apply_updates(p, updates), s

    p = params()
    state = tx.init(p)
    before = float(loss(p))
    for _ in range(20):
        p, state = step(p, state)
    assert float(loss(p)) < 0.7 * before


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon", "sgd"])
def test_weight_decay_is_rate_times_learning_rate(name):
    """With no gradient a matrix shrinks by exactly that share; nothing else moves."""
    config = optim(
        name=name, schedule="constant", learning_rate=0.01, warmup_steps=0, weight_decay=0.5
    )
    tx, _ = make_optimizer(config, 10)
    zero = jax.tree.map(jnp.zeros_like, params())
    updates, _ = tx.update(zero, tx.init(params()), params())
    kernel = updates["stack"]["0_softmax"]["query"]["kernel"]
    np.testing.assert_allclose(kernel, -0.005, rtol=1e-4)
    assert float(jnp.abs(updates["embed"]["table"]).max()) < 1e-8


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_weight_decay_of_its_own(name):
    """decay_times_rate off: a step takes weight_decay of every matrix, at any learning rate."""
    fields = {"name": name, "schedule": "cosine", "weight_decay": 0.1, "decay_times_rate": False}
    tx, _ = make_optimizer(optim(**fields, learning_rate=1e-3), 10)
    zero = jax.tree.map(jnp.zeros_like, params())
    updates, _ = jax.jit(tx.update)(zero, tx.init(params()), params())
    kernel = updates["stack"]["0_softmax"]["query"]["kernel"]
    np.testing.assert_allclose(kernel, np.full(kernel.shape, -0.1), rtol=1e-5)
    assert not np.any(updates["embed"]["table"])


def test_adafactor_relative_to_the_parameter():
    gradient = jax.tree.map(jnp.ones_like, params())

    def step(size, **fields):
        tx, _ = make_optimizer(optim(name="adafactor", weight_decay=0.0, **fields), 10)
        weights = jax.tree.map(lambda x: size * x, params())
        updates, _ = jax.jit(tx.update)(gradient, tx.init(weights), weights)
        return updates["embed"]["table"][0, 0]

    assert step(3.0, parameter_scale=True) == pytest.approx(3 * float(step(1.0)), rel=1e-5)
    assert step(3.0) == pytest.approx(float(step(1.0)), rel=1e-5)


def test_wsd_ends_at_the_final_fraction_however_long_the_warmup():
    schedule = make_schedule(optim(schedule="wsd", warmup_steps=80, decay_fraction=0.5), 100)
    np.testing.assert_allclose(schedule(100), 0.1, atol=1e-6)


def test_muon_orthogonalises_each_layer_of_each_stack():
    tx, _ = make_optimizer(optim(name="muon", warmup_steps=0, weight_decay=0.0), 10)
    p = {"stack": {"query": {"kernel": jnp.ones((2, 3, 8, 8))}}}  # [rows, stacks, in, out]
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), p)
    updates, _ = tx.update(grads, tx.init(p), p)
    singular = jnp.linalg.svd(updates["stack"]["query"]["kernel"], compute_uv=False)
    assert float(jnp.max(singular[..., 0] / singular[..., -1])) < 2.5


def test_muon_orthogonalises_each_layer_by_itself():
    tx, _ = make_optimizer(
        optim(name="muon", schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=0.0), 10
    )
    p = params()
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), p)
    updates, _ = tx.update(grads, tx.init(p), p)
    for layer in updates["stack"]["0_softmax"]["query"]["kernel"]:
        singular = jnp.linalg.svd(layer, compute_uv=False)
        assert float(singular[0] / singular[-1]) < 2.5  # Newton-Schulz leaves them within 0.7..1.2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": "adamm"}, "config.optim.name"),
        ({"schedule": "cos"}, "config.optim.schedule"),
        ({"final_fraction": 2.0}, "config.optim.final_fraction"),
        ({"decay_fraction": -0.1}, "config.optim.decay_fraction"),
        ({"warmup_steps": -1}, "config.optim.warmup_steps"),
        ({"learning_rate": -1.0}, "config.optim.learning_rate"),
        ({"learning_rate": float("nan")}, "config.optim.learning_rate"),
    ],
)
def test_bad_settings_name_the_field(fields, named):
    with pytest.raises(ValueError, match=named):
        make_optimizer(optim(**fields), 10)
