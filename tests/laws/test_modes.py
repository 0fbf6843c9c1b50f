"""JAX's own modes: strict promotion, no compilation, a search for NaN."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.decoding import generate
from longctx_jax.decoding.sampling import Sampling
from longctx_jax.models import build_model
from longctx_jax.ops.losses import chunked_token_nll
from tests.helpers import assert_close
from tests.laws.cases import CASES, MIXTURES, SEGMENTS, SIZES, TOKENS, build, laws, variables_of
from tests.laws.test_isolation import SCHEMES
from tests.ops.test_quarantine import FAST, FORMS

WEIGHTS = np.ones(TOKENS.shape, np.float32)


def model_of(name):
    if name in SCHEMES:
        own = {"sliding": {"window_len": 5}, "decay": {"chunk_len": 4}}
        return build_model({**SIZES, **own, **SCHEMES[name]})
    return build(name)


over_models = pytest.mark.parametrize("name", laws((*CASES, *MIXTURES, *SCHEMES)))


def loss(model, variables, params, cache, n_tokens=TOKENS.shape[1]):
    here = slice(0, n_tokens)
    out = model.hidden(
        {**variables, "params": params},
        TOKENS[:, here],
        cache,
        segment_ids=SEGMENTS[:, here],
        train=True,
        rngs={"dropout": jax.random.key(0)},
    )
    nll = chunked_token_nll(
        out.hidden,
        model.unembedding(variables),
        jnp.asarray(TOKENS[:, here]),
        chunk_len=5,
        weights=jnp.asarray(WEIGHTS[:, here]),
    )
    return jnp.sum(nll)


@contextlib.contextmanager
def strict():
    """No dtype and no rank is promoted without a word."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@over_models
def test_training_and_decoding_promote_nothing(name):
    model = model_of(name)
    with strict():
        variables = jax.eval_shape(model.init, jax.random.key(0))
        cache = jax.eval_shape(lambda: model.init_cache(2, 24))
        gradient = jax.grad(lambda p, v, c: loss(model, v, p, c))
        jax.eval_shape(gradient, variables["params"], variables, cache)
        jax.eval_shape(model.apply, variables, TOKENS[:, :1], cache)


@pytest.mark.parametrize("name", laws(FORMS, fast=FAST))
def test_ops_promote_nothing(name):
    make, *form = FORMS[name]
    run, arrays = make(*form)
    with strict():
        jax.eval_shape(jax.grad(lambda given: jnp.sum(run(**given)[0])), arrays)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_ops_without_compilation(name):
    make, *form = FORMS[name]
    run, arrays = make(*form)

    def value_and_gradient():
        return jax.value_and_grad(lambda given: jnp.sum(run(**given)[0] ** 2))(arrays)

    with jax.disable_jit():
        value, gradient = value_and_gradient()
    expected, other = value_and_gradient()
    assert_close(value, expected, rel_rms=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        assert_close(a, b, rel_rms=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*CASES, *SCHEMES))
def test_generation_without_compilation(name):
    model = model_of(name)
    options = {"max_new_tokens": 1, "sampling": Sampling(temperature=0.0)}
    with jax.disable_jit():
        found = generate(model, variables_of(model), TOKENS[:, :3], **options)
    expected = generate(model, variables_of(model), TOKENS[:, :3], **options)
    assert found.tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decay-gated", "softmax-mha", "mamba-version1"])
def test_a_gradient_without_compilation(name):
    model = model_of(name)
    variables = jax.tree.map(jnp.asarray, variables_of(model))

    def gradient():
        return jax.grad(lambda p: loss(model, variables, p, None, 5))(variables["params"])

    with jax.disable_jit():
        found = gradient()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradient()), strict=True):
        assert_close(a, b, rel_rms=1e-3, max_abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*CASES, *MIXTURES, *SCHEMES))
def test_no_nan_on_the_way(name):
    """Not even one that is masked afterwards, in values and gradients."""
    model = model_of(name)
    variables = jax.tree.map(jnp.asarray, variables_of(model))
    with jax.debug_nans(True):
        cache = model.init_cache(2, 24)
        run = jax.jit(jax.grad(lambda p: loss(model, variables, p, cache)))
        jax.block_until_ready(run(variables["params"]))
