"""Dtypes and sizes: bfloat16, float64, one token, one row, one head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from tests.helpers import assert_close, in_float64
from tests.laws.cases import (
    BATCH,
    MIXERS,
    SEGMENTS,
    SEQ,
    TOKENS,
    build,
    fields_of,
    over_mixers,
    variables_of,
)


def logits_of(name, dtype):
    """Returns the logits of two cached calls in a dtype; the cache keeps its dtypes."""
    model = build(name, dtype=dtype)
    cache = model.init_cache(BATCH, SEQ)
    dtypes = jax.tree.map(jnp.result_type, cache)
    logits = []
    for piece in (slice(0, 9), slice(9, 10)):
        segments = SEGMENTS[:, piece]
        out = model.apply(variables_of(build(name)), TOKENS[:, piece], cache, segment_ids=segments)
        cache = out.cache
        assert jax.tree.map(jnp.result_type, cache) == dtypes
        logits.append(out.logits)
    return jnp.concatenate(logits, axis=1)


@over_mixers
def test_bfloat16_is_close_to_float32(name):
    float32, bfloat16 = logits_of(name, "float32"), logits_of(name, "bfloat16")
    assert float32.dtype == bfloat16.dtype == jnp.float32
    assert np.abs(bfloat16 - float32).max() > 0
    # A key near the border of two codes takes the other one: single rows are off by more.
    rel_rms = 0.3 if name.startswith("vq") else 0.12
    assert_close(bfloat16, float32, rel_rms=rel_rms)  # seen: 6e-2


@over_mixers
def test_float64_is_close_to_float32(name):
    float32 = logits_of(name, "float32")

    @in_float64
    def wide():
        return logits_of(name, "float64")

    float64 = wide()
    assert float64.dtype == jnp.float64
    assert_close(float32, float64, rel_rms=3e-6)


@over_mixers
def test_one_token_one_row_one_head(name):
    kind = name.partition("-")[0]
    own = fields_of(name).get(kind, {})
    if "n_groups" in own:
        own = {**own, "n_groups": 1}
    sizes = {"n_heads": 1, "n_kv_heads": 1, "n_layers": 1, "d_ff": 1}
    model = build_model(fields_of(name, **sizes, **{kind: own}), MIXERS)
    variables = variables_of(model)
    whole = model.apply(variables, TOKENS[:1, :3]).logits
    cache, logits = model.init_cache(1, 3), []
    for t in range(3):
        out = model.apply(variables, TOKENS[:1, t : t + 1], cache)
        cache = out.cache
        logits.append(out.logits)
    assert whole.shape == (1, 3, 11) and np.isfinite(whole).all()
    assert_close(jnp.concatenate(logits, axis=1), whole, rel_rms=2e-6)
    alone = model.apply(variables, TOKENS[:1, :1]).logits
    assert_close(alone, whole[:, :1], rel_rms=2e-6)


@over_mixers
def test_parameters_stay_float32_where_64_bits_are_enabled(name):
    @in_float64
    def dtypes():
        shapes = jax.eval_shape(lambda: build(name).init(jax.random.key(0)))
        return {leaf.dtype for leaf in jax.tree.leaves(shapes)}

    assert dtypes() == {jnp.dtype("float32")}


def test_every_mixer_has_an_example():
    assert all(mixer.examples for mixer in MIXERS.values())


@pytest.mark.parametrize("kind", MIXERS)
def test_every_mixer_checks_its_own_fields(kind):
    for field, value in vars(MIXERS[kind].config()).items():
        if type(value) is int and kind != "running_mean":
            with pytest.raises(ValueError, match=rf"config\.model\.{kind}\.{field} must be"):
                MIXERS[kind].config(**{field: 2.5})
