"""The associative memory against loops over tokens and numbers, its empty state, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops import memory
from longctx_jax.ops.memory import reference
from longctx_jax.ops.memory.associative import EPS
from tests.helpers import assert_close, in_float64, make_normal

BATCH, TOKENS, WIDTH, VALUE, NU = 2, 5, 4, 3, 3


def make_inputs(*, seed=0, scale=1.0):
    """Returns features [batch, tokens, features], value, beta and a state that is not empty."""
    key = make_normal(seed, BATCH, TOKENS, WIDTH, scale=scale)
    value = make_normal(seed + 1, BATCH, TOKENS, VALUE)
    beta = 1 / (1 + np.exp(-make_normal(seed + 2, BATCH, TOKENS)))
    features = np.asarray(memory.dpfp(jnp.asarray(key), NU))
    matrix = make_normal(seed + 3, BATCH, 2 * NU * WIDTH, VALUE)
    normalizer = 0.3 * np.abs(make_normal(seed + 4, BATCH, 2 * NU * WIDTH))
    state = memory.MemoryState(jnp.asarray(matrix), jnp.asarray(normalizer))
    return jnp.asarray(features), jnp.asarray(value), jnp.asarray(beta), state


@in_float64
@pytest.mark.parametrize("nu", (1, 3, 2 * WIDTH - 1))
def test_features_are_products_with_the_rolled_halves(nu):
    x = make_normal(0, 3, WIDTH)
    features = np.asarray(memory.dpfp(jnp.asarray(x), nu))
    assert features.shape == (3, memory.n_features(WIDTH, nu))
    for row, vector in zip(features, x, strict=True):
        np.testing.assert_array_equal(row, reference.dpfp(vector, nu))
    assert np.all(features >= 0)
    assert_close(memory.dpfp(jnp.asarray(3 * x), nu), 9 * features, rel_rms=1e-15)


@pytest.mark.parametrize("nu", (0, 2 * WIDTH))
def test_an_impossible_order_is_refused(nu):
    with pytest.raises(ValueError, match="memory.nu"):
        memory.dpfp(jnp.ones((1, WIDTH)), nu)


@in_float64
@pytest.mark.parametrize("eps", (EPS, 0.5))
@pytest.mark.parametrize("correction", (True, False))
@pytest.mark.parametrize("is_empty", (True, False))
def test_write_and_read_equal_loops(is_empty, correction, eps):
    features, value, beta, state = make_inputs()
    flags = jnp.full((BATCH,), is_empty)
    options = {"is_empty": flags, "correction": correction, "eps": eps}
    new, gamma = memory.associative_write(features, value, beta, state, **options)
    out = memory.associative_read(features, new, eps=eps)
    clipped = []
    for row in range(BATCH):
        old = [np.asarray(leaf[row]) for leaf in state]
        if is_empty:
            old = [np.zeros_like(leaf) for leaf in old]  # what the memory held does not count
        arrays = (np.asarray(a[row]) for a in (features, value, beta))
        options = {"is_empty": is_empty, "correction": correction, "eps": eps}
        matrix, normalizer, expected = reference.write(*arrays, *old, **options)
        assert_close(new.matrix[row], matrix, rel_rms=1e-14)
        assert_close(new.normalizer[row], normalizer, rel_rms=1e-14)
        assert_close(gamma[row], expected, rel_rms=1e-14)
        recalled = [reference.read(np.asarray(f), matrix, normalizer, eps) for f in features[row]]
        assert_close(out[row], np.stack(recalled), rel_rms=1e-13)
        clipped.append(expected)
    if correction and not is_empty:  # both sides of the clip occur
        assert np.any(np.stack(clipped) == 0) and np.any(np.stack(clipped) > 0)


@in_float64
def test_an_empty_memory_recalls_nothing_and_takes_keys_whole():
    features, value, beta, _ = make_inputs(scale=0.05)  # small keys: eps would show
    empty = memory.init_memory_state((BATCH,), features.shape[-1], VALUE, jnp.float64)
    assert not np.any(memory.associative_read(features, empty))
    first = memory.associative_write(
        features, value, beta, empty, is_empty=jnp.full((BATCH,), True)
    )
    np.testing.assert_array_equal(first.gamma, 1.0)
    formula = memory.associative_write(features, value, beta, empty)
    assert np.all(np.asarray(formula.gamma) < 0.97)


@in_float64
def test_a_single_key_recalls_its_value():
    features, value, _, _ = make_inputs()
    features, value = features[:, :1], value[:, :1]
    empty = memory.init_memory_state((BATCH,), features.shape[-1], VALUE, jnp.float64)
    full = jnp.ones((BATCH, 1))
    state, _ = memory.associative_write(
        features, value, full, empty, is_empty=jnp.full((BATCH,), True)
    )
    out = memory.associative_read(features, state)
    norm = jnp.sum(features**2, -1, keepdims=True)
    assert_close(out, value * norm / (norm + EPS), rel_rms=1e-14)
    # Written again with another value, the old one is gone: the delta rule.
    state, gamma = memory.associative_write(features, -value, full, state)
    assert_close(memory.associative_read(features, state), -value, rel_rms=1e-4)
    assert np.all(np.asarray(gamma) < 1e-4)


@in_float64
def test_gamma_gets_no_gradient_and_the_rest_does():
    features, value, beta, state = make_inputs()

    def total(features, freeze):
        new, gamma = memory.associative_write(features, value, beta, state)
        normalizer = state.normalizer + jnp.einsum(
            "btf,bt->bf", features, jax.lax.stop_gradient(gamma) if freeze else gamma
        )
        return jnp.sum(new.matrix**2) + jnp.sum(normalizer**3)

    assert_close(jax.grad(total)(features, False), jax.grad(total)(features, True), rel_rms=1e-15)
    step = 1e-6
    plus, minus = features.at[0, 0, 0].add(step), features.at[0, 0, 0].add(-step)

    def matrix_total(features):
        return jnp.sum(memory.associative_write(features, value, beta, state).state.matrix ** 2)

    slope = (matrix_total(plus) - matrix_total(minus)) / (2 * step)
    assert_close(jax.grad(matrix_total)(features)[0, 0, 0], slope, rel_rms=1e-6)


@pytest.mark.slow
def test_low_precision_features_meet_a_float32_memory():
    features, value, beta, state = make_inputs()
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in (features, value, beta)]
    state = memory.MemoryState(*(jnp.asarray(a, jnp.float32) for a in state))
    new, gamma = memory.associative_write(*rounded, state)
    assert {leaf.dtype for leaf in (*new, gamma)} == {jnp.dtype("float32")}
    wide = [a.astype(jnp.float32) for a in rounded]
    expected, _ = memory.associative_write(*wide, state)
    assert_close(new.matrix, expected.matrix, rel_rms=1e-6)
    assert memory.associative_read(rounded[0], new).dtype == jnp.bfloat16


@pytest.mark.slow
def test_composes_and_checks_shapes():
    features, value, beta, _ = make_inputs()
    state = memory.init_memory_state((BATCH,), features.shape[-1], VALUE)

    def loss(f, v, b, s):
        return jnp.sum(memory.associative_write(f, v, b, s).state.matrix)

    by_row = jax.jit(jax.vmap(jax.grad(loss)))(features, value, beta, state)
    assert_close(by_row, jax.grad(loss)(features, value, beta, state), rel_rms=1e-6)
    with pytest.raises(ValueError, match="init_memory_state"):
        memory.associative_read(features[..., :-1], state)
