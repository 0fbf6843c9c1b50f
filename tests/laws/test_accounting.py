"""Every mixer is counted: cache bytes, products, temporaries, and how it lies on a mesh."""

import jax
import numpy as np
import pytest

from configs import base
from longctx_jax.accounting import caches, flops, programs
from longctx_jax.training.plan import make_plan
from tests.accounting.test_flops import count_dots
from tests.laws.cases import BATCH, CASES, SEQ, build, over_mixers


@pytest.mark.parametrize("name", CASES)
def test_cache_bytes_are_those_of_the_arrays(name):
    model = build(name)
    arrays = jax.tree.leaves(model.init_cache(BATCH, 7))
    assert caches.cache_bytes(model, BATCH, 7) == sum(leaf.nbytes for leaf in arrays)
    assert sum(caches.cache_terms(model, BATCH, 7).values()) == caches.cache_bytes(model, BATCH, 7)


@over_mixers
def test_flops_are_about_those_of_the_program(name):
    """Formulas of single mixers are exact for their plain forms: tests/accounting/test_flops.py."""
    model = build(name)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((BATCH, SEQ), np.int32)
    dots = count_dots(jax.make_jaxpr(model.apply)(variables, tokens).jaxpr)
    formula = BATCH * SEQ * flops.forward_flops_per_token(model.config, SEQ, pairs="dense")
    assert 0.5 * dots < formula < 1.5 * dots


@over_mixers
def test_programs_have_a_prediction(name):
    for program in programs.PROGRAMS:
        plan, terms = programs.predicted(build(name), program, batch_size=2, max_len=8)
        assert plan["peak"] > plan["temporaries"] == sum(terms.values()) > 0


@over_mixers
def test_every_matrix_of_a_mixer_is_spread_over_a_mesh(name):
    """Two by four devices: each matrix of the mixer lies on more than one, as its rules say."""
    config = base.get_config()
    config.mesh.data, config.mesh.model, config.mesh.fsdp = 2, 4, "on"
    config.data.global_batch_size = 8
    model = build(name, d_model=32, n_heads=4, n_kv_heads=4)
    plan = make_plan(config, model, 8)
    specs = plan.layout.specs(plan.shapes).params["stack"]
    leaves = jax.tree_util.tree_leaves_with_path(plan.shapes.params["stack"])
    is_spec = {"is_leaf": lambda x: isinstance(x, jax.sharding.PartitionSpec)}
    for (path, leaf), spec in zip(leaves, jax.tree.leaves(specs, **is_spec), strict=True):
        is_matrix = jax.tree_util.keystr(path).endswith("['kernel']")
        if is_matrix and "'mixer'" in jax.tree_util.keystr(path) and max(leaf.shape[1:]) >= 32:
            assert any(spec), f"{jax.tree_util.keystr(path)} {leaf.shape} is whole everywhere"
