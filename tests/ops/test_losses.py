"""Losses against float64 formulas, and the memory that chunking the logits promises."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops.losses import (
    bits_per_byte,
    chunked_token_nll,
    token_nll,
    weighted,
)
from tests.helpers import assert_close, assert_trees_close, make_normal, sub_jaxprs

BATCH, SEQ, MODEL, VOCAB = 2, 11, 6, 13
TARGETS = np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ))
HIDDEN, UNEMBEDDING = make_normal(1, BATCH, SEQ, MODEL), make_normal(2, MODEL, VOCAB)


def float64_nll(logits, targets):
    log_normalizer = np.logaddexp.reduce(logits, axis=-1)
    return log_normalizer - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_token_nll(scale):
    logits = scale * make_normal(0, BATCH, SEQ, VOCAB)
    actual = token_nll(jnp.float32(logits), jnp.asarray(TARGETS))
    assert_close(actual, float64_nll(logits, TARGETS), rel_rms=1e-6)


def test_token_nll_of_bfloat16_logits_is_float32():
    logits = jnp.asarray(make_normal(0, BATCH, SEQ, VOCAB), jnp.bfloat16)
    actual = token_nll(logits, jnp.asarray(TARGETS))
    assert actual.dtype == jnp.float32
    assert_close(actual, float64_nll(np.asarray(logits, np.float64), TARGETS), rel_rms=1e-6)


def make_loss(chunk_len, weights):
    def loss(hidden, unembedding):
        nll = chunked_token_nll(hidden, unembedding, jnp.asarray(TARGETS), chunk_len=chunk_len)
        return jnp.sum(nll * weights), nll

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize("chunk_len", [0, 1, 3, 10, 11, 12])
def test_chunks_change_nothing(chunk_len):
    weights = make_normal(3, BATCH, SEQ)
    with jax.enable_x64(True):
        expected = jax.jit(make_loss(0, weights))(HIDDEN, UNEMBEDDING)
        expected = jax.tree.map(np.asarray, expected)
        assert_close(expected[0][1], float64_nll(HIDDEN @ UNEMBEDDING, TARGETS), rel_rms=1e-12)
        actual = jax.jit(make_loss(chunk_len, weights))(HIDDEN, UNEMBEDDING)
    assert_trees_close(actual, expected, rel_rms=1e-12)


def most_logits(chunk_len):
    """Returns the elements of the largest array with a vocab axis in the gradient's program."""
    loss = functools.partial(make_loss(chunk_len, 1.0))
    jaxpr = jax.make_jaxpr(loss)(jnp.float32(HIDDEN), jnp.float32(UNEMBEDDING)).jaxpr
    shapes = [
        variable.aval.shape
        for inner in sub_jaxprs(jaxpr)
        for equation in inner.eqns
        for variable in equation.outvars
        if VOCAB in variable.aval.shape and MODEL not in variable.aval.shape
    ]
    return max(math.prod(shape) for shape in shapes)


@pytest.mark.parametrize("chunk_len", [1, 3, 5])
def test_no_pass_holds_more_logits_than_a_chunk(chunk_len):
    assert most_logits(0) == BATCH * SEQ * VOCAB
    assert most_logits(chunk_len) <= BATCH * chunk_len * VOCAB


def test_bits_per_byte():
    assert bits_per_byte(8 * math.log(2.0), 4) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("chunk_len", "bad"), [(0, "hidden"), pytest.param(4, "target", marks=pytest.mark.slow)]
)
def test_what_has_no_weight_counts_nothing(chunk_len, bad):
    """Neither a target outside the vocabulary (-100) nor activations that are NaN or inf."""
    weights = np.ones((BATCH, SEQ), np.float32)
    weights[0, 3] = weights[1, 7] = 0
    targets, hidden = TARGETS.copy(), np.float32(HIDDEN)
    if bad == "target":
        targets[0, 3], targets[1, 7] = -100, VOCAB
    else:
        hidden[0, 3], hidden[1, 7, 0] = np.nan, np.inf

    def loss(hidden, unembedding, targets):
        options = {"chunk_len": chunk_len, "weights": jnp.asarray(weights)}
        return jnp.sum(chunked_token_nll(hidden, unembedding, jnp.asarray(targets), **options))

    plain = jnp.float32(HIDDEN), jnp.float32(UNEMBEDDING)
    value, gradient = jax.value_and_grad(loss, (0, 1))(jnp.asarray(hidden), plain[1], targets)
    expected, other = jax.value_and_grad(loss, (0, 1))(*plain, TARGETS)
    assert_close(value, expected, rel_rms=1e-6)
    assert_trees_close(gradient, other, rel_rms=1e-6)


@pytest.mark.parametrize("bad", [-100, -1, VOCAB])
def test_a_target_outside_the_vocabulary_is_seen(bad):
    targets = TARGETS.copy()
    targets[1, 2] = bad
    nll = np.array(token_nll(jnp.float32(make_normal(0, BATCH, SEQ, VOCAB)), jnp.asarray(targets)))
    assert np.isnan(nll[1, 2])
    nll[1, 2] = 0
    assert np.isfinite(nll).all()


def test_minus_infinite_logits_without_weight():
    logits = jnp.zeros((1, 2, 3)).at[0, 1, 2].set(-jnp.inf)
    nll = token_nll(logits, jnp.asarray([[2, 2]]))
    assert np.isinf(nll[0, 1])
    assert weighted(nll, jnp.asarray([[1.0, 0.0]])).tolist() == [[nll[0, 0], 0.0]]


def test_bits_per_byte_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got 0 bytes"):
        bits_per_byte(1.0, 0)
