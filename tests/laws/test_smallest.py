"""The smallest and the oddest sizes that a mixer's fields allow: all of them 1, or odd."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from tests.helpers import assert_close, random_variables
from tests.laws.cases import CASES, MIXERS, fields_of, laws

over_mixers = pytest.mark.parametrize("name", laws(CASES, fast=("running_mean-mean",)))
LENGTHS = ("window_len", "chunk_len", "block_len", "codebook_size", "d_state", "conv_len")
RANKS = ("shift_rank", "decay_rank", "step_rank")


def smallest(name, size):
    """Returns the fields of a case with every length of its mixer set to `size`."""
    kind = name.partition("-")[0]
    own = dict(fields_of(name).get(kind, {}))
    known = {field.name for field in dataclasses.fields(MIXERS[kind].config)}
    own |= {field: size for field in (*LENGTHS, *RANKS) if field in known}
    if "n_groups" in own:
        own["n_groups"] = 1
    sizes = {"n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "d_ff": 1, "d_key": 2, "d_value": 1}
    if fields_of(name).get("mlp") == "none":
        sizes["d_value"] = 3
    return fields_of(name, **sizes, **{kind: own})


@pytest.mark.parametrize("size", [1, pytest.param(3, marks=pytest.mark.slow)])
@over_mixers
def test_split_law_and_gradients(name, size):
    model = build_model(smallest(name, size), MIXERS)
    variables = random_variables(lambda: model.init(jax.random.key(0)))
    tokens = np.arange(5, dtype=np.int32)[None] % 11
    ids = np.array([[0, 0, 1, 1, 1]], np.int32)

    def loss(params):
        out = model.apply({**variables, "params": params}, tokens, segment_ids=ids)
        return jnp.sum(out.logits**2), out.logits

    (_, whole), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((whole, gradient)))
    for lengths in ((1,) * 5, (3, 2)):
        cache, start, logits = model.init_cache(1, 5), 0, []
        for length in lengths:
            piece = slice(start, start + length)
            out = model.apply(variables, tokens[:, piece], cache, segment_ids=ids[:, piece])
            cache, start = out.cache, piece.stop
            logits.append(out.logits)
        assert_close(jnp.concatenate(logits, axis=1), whole, rel_rms=5e-6)


@over_mixers
def test_a_model_one_wide(name):
    """One number a token, where the mixer's own widths allow it."""
    fields = {**smallest(name, 1), "d_model": 2}
    kind = name.partition("-")[0]
    if kind == "mamba":
        fields["mamba"] = {**fields["mamba"], "head_len": 1}
    model = build_model(fields, MIXERS)
    variables = random_variables(lambda: model.init(jax.random.key(0)))
    logits = model.apply(variables, np.zeros((1, 1), np.int32)).logits
    assert logits.shape == (1, 1, 11) and np.isfinite(logits).all()
