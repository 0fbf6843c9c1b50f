"""Sampling filters against their definitions; generation against repeated full forward passes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.decoding import NonFiniteLogitsError, cast_weights, generate, weights
from longctx_jax.decoding.sampling import Sampling, filter_logits, sample
from longctx_jax.models import build_model
from longctx_jax.models.decoder import Decoder
from tests.helpers import assert_close, random_variables
from tests.models.tiny_models import MODELS, TINY
from tests.tiny import tiny_config

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(
    scope="module",
    params=[
        "transformer",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("decay", "pattern")),
    ],
)
def model_and_variables(request):
    fields = {"model__name": request.param, "model__vocab_size": 13}
    if request.param == "pattern":
        fields |= {"model__name": "decay", "model__pattern": ("sliding", "decay")}
        fields |= {"model__n_layers": 2, "model__sliding__window_len": 3}
    model = build_model(tiny_config(**fields).model)
    return model, jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))


def test_greedy_equals_the_definition(model_and_variables):
    """Each token is the argmax after one full forward pass over everything before it."""
    model, variables = model_and_variables
    prompt = [1, 5, 2, 7, 7, 3]
    out = generate(model, variables, [prompt], max_new_tokens=5, sampling=GREEDY, prefill_len=4)
    text = list(prompt)
    for _ in range(5):
        padded = jnp.asarray([text + [0] * (11 - len(text))])  # one shape; the future is not seen
        logits = model.apply(variables, padded).logits[0, len(text) - 1]
        text.append(int(jnp.argmax(logits)))
    assert out.tolist() == [text[6:]]


def test_prompts_of_different_lengths_do_not_see_their_padding(model_and_variables):
    model, variables = model_and_variables
    prompts = [[1, 5, 2, 7, 7, 3], [4]]
    together = generate(model, variables, prompts, max_new_tokens=4, sampling=GREEDY)
    for prompt, row in zip(prompts, together, strict=True):
        alone = generate(model, variables, [prompt], max_new_tokens=4, sampling=GREEDY)
        assert alone[0].tolist() == row.tolist()


@pytest.mark.slow
def test_prompts_of_a_segment_recurrent_model_keep_their_segments():
    """Each row, and its draws, are those of the prompt alone: padding must not move its segments.

    The draws of row r depend on r, so "alone" is in the same place among equal prompts.
    """
    config = tiny_config(model__name="recurrent_memory", model__vocab_size=13).model
    config.memory.update({"kind": "armt", "segment_len": 2, "n_memory_tokens": 1, "d_memory": 4})
    model = build_model(config)
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    random = [x + jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    variables = jax.tree.unflatten(tree, random)  # also what starts at 0: values of the memory
    tokens = np.random.default_rng(0).integers(0, 13, 9).tolist()
    prompts = [tokens[:5], tokens[4:6], tokens[6:9], tokens[:4]]
    options = {"max_new_tokens": 5, "prefill_len": 1}  # few shapes to compile
    together = generate(model, variables, prompts, **options)
    for row, prompt in enumerate(prompts):
        alone = generate(model, variables, [prompt] * len(prompts), **options)
        assert together[row].tolist() == alone[row].tolist()


def test_draws_depend_on_the_key(model_and_variables):
    model, variables = model_and_variables
    if model.config.pattern != ("decay",):
        pytest.skip("one model is enough")
    variables = jax.tree.map(lambda x: x / 10, variables)  # near-uniform
    draw = [
        generate(model, variables, [[1]], max_new_tokens=20, key=jax.random.key(k)).tolist()
        for k in (0, 0, 1)
    ]
    assert draw[0] == draw[1] != draw[2]


LOGITS = jnp.log(jnp.asarray([[0.5, 0.25, 0.15, 0.1], [0.1, 0.2, 0.3, 0.4]]))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (Sampling(top_k=2), [[1, 1, 0, 0], [0, 0, 1, 1]]),
        (Sampling(top_p=0.5), [[1, 0, 0, 0], [0, 0, 1, 1]]),
        (Sampling(top_p=0.51), [[1, 1, 0, 0], [0, 0, 1, 1]]),
        (Sampling(top_p=1e-9), [[1, 0, 0, 0], [0, 0, 0, 1]]),
        (Sampling(top_k=3, top_p=0.6), [[1, 1, 0, 0], [0, 0, 1, 1]]),
        (Sampling(top_k=99), [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (Sampling(top_p=0.75), [[1, 1, 0, 0], [0, 1, 1, 1]]),  # .5 + .25 reaches it
        (Sampling(top_p=0.9), [[1, 1, 1, 0], [0, 1, 1, 1]]),
    ],
    ids=str,
)
def test_filters_keep_the_right_tokens(sampling, kept):
    np.testing.assert_array_equal(jnp.isfinite(filter_logits(LOGITS, sampling)), np.array(kept))


def test_temperature_scales_and_zero_is_greedy():
    np.testing.assert_allclose(filter_logits(LOGITS, Sampling(temperature=0.5)), 2 * LOGITS)
    assert sample(jax.random.key(0), LOGITS, GREEDY).tolist() == [0, 3]


def test_frequencies_follow_the_probabilities():
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = jax.vmap(lambda k: sample(k, LOGITS, Sampling()))(keys)
    share = np.mean(np.asarray(draws)[:, 0] == 0)
    assert abs(share - 0.5) < 0.03


@pytest.mark.parametrize("n_codes", [4, 7])
def test_ties_go_to_the_lowest_ids(n_codes):
    equal = jnp.zeros((1, n_codes))
    for k in range(1, n_codes):
        kept = jnp.isfinite(filter_logits(equal, Sampling(top_k=k)))[0]
        assert kept.tolist() == [True] * k + [False] * (n_codes - k)
        kept = jnp.isfinite(filter_logits(equal, Sampling(top_p=k / n_codes)))[0]
        assert kept.tolist() == [True] * k + [False] * (n_codes - k)


def test_the_smallest_set_that_reaches_p():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.1, 0.1]]))
    kept = jnp.isfinite(filter_logits(logits, Sampling(top_p=0.8)))
    assert kept.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -math.inf])
def test_temperatures_that_are_no_number(temperature):
    with pytest.raises(ValueError, match="temperature must be a number that is not negative"):
        Sampling(temperature=temperature)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_bad_sampling_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        ([[1, 13]], 1, "vocab_size=13.*has 13 at position 1"),
        ([[-1]], 1, "has -1 at position 0"),
        ([[1], []], 1, "prompt 1 is empty"),
        ([], 1, "got none"),
        ([[1]], 0, "max_new_tokens"),
    ],
    ids=str,
)
def test_bad_prompts(model_and_variables, prompts, n, message):
    model, variables = model_and_variables
    with pytest.raises(ValueError, match=message):
        generate(model, variables, prompts, max_new_tokens=n)


def test_weights_that_are_not_finite_are_an_error(model_and_variables):
    model, variables = model_and_variables
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(NonFiniteLogitsError, match="before new token 0 of prompt 0"):
        generate(model, broken, [[1, 2]], max_new_tokens=3)


def test_arrays_and_lists_are_prompts_alike(model_and_variables):
    model, variables = model_and_variables
    options = {"max_new_tokens": 2, "sampling": GREEDY}
    lists = generate(model, variables, [[1, 2], [3, 4]], **options)
    for array in (np.array([[1, 2], [3, 4]]), jnp.asarray([[1, 2], [3, 4]], jnp.int8)):
        assert generate(model, variables, array, **options).tolist() == lists.tolist()


@pytest.mark.parametrize(
    "name",
    ["transformer", *(pytest.param(n, marks=pytest.mark.slow) for n in ("decay", "stagformer"))],
)
def test_weights_are_cast_once_to_what_apply_rounds_them_to(name):
    """The same logits from half the bytes; what is computed with in float32 stays float32."""
    config = tiny_config(model__name=name, model__vocab_size=13, model__dtype="bfloat16")
    config = config.model
    config.n_layers = 2
    model = build_model(config)
    variables = random_variables(lambda: model.init(jax.random.key(0)))
    cast = cast_weights(model, variables)
    paths = jax.tree_util.tree_leaves_with_path(cast)
    for path, leaf in paths:
        expected = {"kernel": jnp.bfloat16, "table": jnp.bfloat16, "scale": jnp.float32}
        assert leaf.dtype == expected.get(path[-1].key, leaf.dtype), jax.tree_util.keystr(path)
    tokens = np.arange(6)[None] % 13
    before, after = (model.apply(v, tokens).logits for v in (variables, cast))
    assert_close(after, before, rel_rms=0.02)  # embeddings are scaled after rounding
    untied = build_model({**config.to_dict(), "tie_embeddings": False, "embed_scale": 1.0})
    variables = random_variables(lambda: untied.init(jax.random.key(0)))
    same = [untied.apply(v, tokens).logits for v in (variables, cast_weights(untied, variables))]
    np.testing.assert_array_equal(*same)
    wide = Decoder(dataclasses.replace(untied.config, dtype="float32"))
    assert cast_weights(wide, variables) is variables


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS])
def test_every_model_decodes_in_bfloat16(name):
    """Tokens are those of float32 where it is sure of them."""
    fields = {**TINY, **MODELS[name]}
    wide, narrow = (build_model({**fields, "dtype": d}) for d in ("float32", "bfloat16"))
    variables = random_variables(lambda: wide.init(jax.random.key(0)))
    options = {"max_new_tokens": 4, "sampling": GREEDY}
    prompts = np.arange(20).reshape(2, 10) % 11
    found = generate(narrow, variables, prompts, **options)
    text = np.concatenate([prompts, found], axis=1)
    logits = np.asarray(wide.apply(variables, text).logits)[:, 9:-1]
    chosen = np.take_along_axis(logits, found[..., None], axis=-1)[..., 0]
    assert np.all(logits.max(axis=-1) - chosen < 0.5 * logits.std())


def test_a_weight_that_a_loop_hands_on_is_computed_with():
    """Where a loop stacks or carries a weight, its later uses are not seen: it stays as it is."""

    def inner(w, other):
        _, stacked = jax.lax.scan(lambda c, _: (c, w), 0.0, jnp.arange(2))
        return other, stacked

    def use(w, other):
        other, stacked = jax.jit(inner)(w, other)
        return other.astype(jnp.bfloat16), stacked[0] + 1.0

    jaxpr = jax.make_jaxpr(use)(jnp.ones(3), jnp.ones(3)).jaxpr
    assert list(weights._uses(jaxpr, jaxpr.invars[0])) == [None]
    assert list(weights._uses(jaxpr, jaxpr.invars[1])) == [jnp.bfloat16]
