"""Any mixer runs under any schedule, cut into segments: same logits, caches and gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from longctx_jax.models.schedules import SCHEDULES
from tests.helpers import assert_close, assert_trees_close
from tests.laws.cases import (
    BATCH,
    CASES,
    MIXTURES,
    SEGMENTS,
    SEQ,
    TOKENS,
    build,
    variables_of,
)

SEGMENT = 5  # divides nothing: the last segment is shorter


def computed(model, variables):
    """Returns logits, the cache, and the gradient of a loss that all of them count in."""
    cache = model.init_cache(BATCH, SEQ)

    def loss(params):
        given = {**variables, "params": params}
        out = model.apply(given, TOKENS, cache, segment_ids=SEGMENTS)
        return jnp.sum(jnp.sin(out.logits)), (out.logits, out.cache.layers)

    return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])


@functools.cache
def whole(name):
    """Returns the variables of a case, and what the whole call at once computes with them."""
    variables = variables_of(build(name))
    return variables, computed(build(name), variables)


FAST = ("running_mean-mean", "diagonal")  # the others compile for seconds


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param(*case, marks=() if case == FAST else pytest.mark.slow)
        for case in itertools.product((*CASES, *MIXTURES), SCHEDULES)
    ],
)
def test_every_schedule_computes_the_same(name, schedule):
    variables, (gradient, (logits, caches)) = whole(name)
    model = build(name, schedule=schedule, segment_len=SEGMENT, n_ramp_buckets=1)
    other, (other_logits, other_caches) = computed(model, variables)
    assert_close(other_logits, logits, rel_rms=2e-6)
    assert_trees_close(other_caches, caches, rel_rms=1e-5)
    assert_trees_close(other, gradient, rel_rms=2e-5)
