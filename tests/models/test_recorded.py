"""Models keep their meaning: parameter trees and losses of updates are those recorded before."""

import json

import jax
import jax.numpy as jnp
import pytest

from longctx_jax.models import build_model
from tests.models.recorded import CASES, FILE, record
from tests.models.tiny_models import TINY

RECORDED = json.loads(FILE.read_text())
REMEDY = "python -m tests.models.recorded writes them anew, if that was intended"


@pytest.mark.parametrize("name", CASES)
def test_parameter_trees_are_as_recorded(name):
    model = build_model({**TINY, **CASES[name]})
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    tree = {jax.tree_util.keystr(p, simple=True, separator="/"): list(x.shape) for p, x in leaves}
    assert tree == RECORDED[name]["tree"], REMEDY
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_updates_are_as_recorded(name):
    found, expected = record(name), RECORDED[name]
    assert found["parameter_norm"] == pytest.approx(expected["parameter_norm"], rel=1e-5), REMEDY
    for update, before in zip(found["updates"], expected["updates"], strict=True):
        assert update == pytest.approx(before, rel=2e-5), REMEDY
