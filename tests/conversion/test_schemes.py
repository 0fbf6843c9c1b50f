"""Another scheme from a transformer: what is kept is the same numbers, the rest is named."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.conversion.schemes import SCHEMES, match, scheme_fields, transfer
from longctx_jax.models import build_model
from tests.helpers import assert_close, random_variables

FIELDS = {
    "n_layers": 2,
    "d_model": 8,
    "n_heads": 2,
    "n_kv_heads": 1,
    "vocab_size": 11,
    "d_ff": 12,
    "norm_eps": 1e-5,
    "softmax": {"rope_theta": 500.0, "rope_scaling": "linear", "rope_factor": 2.0},
    "decay": {"chunk_len": 4},
    "memory": {"segment_len": 4, "n_memory_tokens": 2, "d_memory": 4},
}


def nested(fields, changes):
    """Returns the fields with dotted changes."""
    fields = {name: dict(v) if isinstance(v, dict) else v for name, v in fields.items()}
    for name, value in changes.items():
        group, _, leaf = name.rpartition(".")
        (fields.setdefault(group, {}) if group else fields)[leaf] = value
    return fields


def models(scheme, changes, more):
    """Returns the transformer, its variables, and the new model; changes of either's fields."""
    source = build_model(nested(FIELDS, changes))
    given = random_variables(source.init, jax.random.key(0))
    changed = nested(nested(FIELDS, changes), scheme_fields(scheme, source.config))
    return source, given, build_model(nested(changed, more))


@functools.cache
def converted(scheme):
    """Returns the transformer, its variables, the new model and the transfer."""
    source, given, target = models(scheme, {}, {"sliding.window_len": 9})
    return source, given, target, transfer(source.config, given, target, jax.random.key(1))


def matched(scheme, changes, more):
    """Returns the variables of a transformer, of a new model, and the match of the two."""
    source, given, target = models(scheme, changes, more)
    fresh = random_variables(target.init, jax.random.key(0), scale=0.1)
    return given, fresh, match(source.config, given, target.config, fresh)


def leaf_of(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree)


def all_paths(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path) for path, _ in flat}


@pytest.mark.parametrize(
    "scheme",
    [pytest.param(s, marks=pytest.mark.slow) if s == "recurrent_memory" else s for s in SCHEMES],
)
def test_every_array_is_kept_or_fresh_and_has_its_shape(scheme):
    _, given, target, moved = converted(scheme)
    wanted = jax.eval_shape(target.init, jax.random.key(0))
    assert jax.tree.structure(moved.variables) == jax.tree.structure(wanted)
    for leaf, like in zip(jax.tree.leaves(moved.variables), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
    assert set(moved.kept) | set(moved.fresh) == all_paths(moved.variables)
    assert not set(moved.kept) & set(moved.fresh) and not moved.dropped
    kind = {"recurrent_memory": "armt"}.get(scheme, scheme)
    for path in moved.kept:
        old = path.replace(f"0_{kind}", "0_softmax").replace("mixer/gain", "mixer_norm/scale")
        assert np.array_equal(leaf_of(moved.variables, path), leaf_of(given, old))
    assert f"params/stack/0_{kind}/mixer/query/kernel" in moved.kept
    assert {"params/embed/table", "params/norm/scale"} <= set(moved.kept)


def test_what_a_scheme_adds_is_fresh():
    assert converted("sliding")[3].fresh == []
    assert converted("decay")[3].fresh == [
        "params/stack/0_decay/mixer/gate/kernel",
        "params/stack/0_decay/mixer/head_norm/scale",
    ]
    memory = converted("recurrent_memory")[3].fresh
    assert memory and all(path.startswith("params/memory/") for path in memory)


def test_a_long_window_computes_what_full_attention_did():
    source, given, target, moved = converted("sliding")
    assert target.config.of("sliding").rotary_scaling == source.config.of("softmax").rotary_scaling
    tokens = jnp.arange(9)[None]
    logits = [m.apply(v, tokens).logits for m, v in ((source, given), (target, moved.variables))]
    assert_close(logits[1], logits[0], rel_rms=1e-6)


def test_a_memory_starts_without_effect():
    """Within a segment an ARMT computes what attention does with memory tokens behind it."""
    source, given, target, moved = converted("recurrent_memory")
    tokens = jnp.arange(4)[None]
    logits = [m.apply(v, tokens).logits for m, v in ((source, given), (target, moved.variables))]
    assert_close(logits[1], logits[0], rel_rms=1e-6)


@pytest.mark.parametrize("position", ["rotary", pytest.param("none", marks=pytest.mark.slow)])
def test_one_layer_of_a_transformer_is_one_of_inattention(position):
    """Keys and values of the first layer come from embeddings in both; the norm is the gain."""
    changes = {"n_layers": 1, "softmax.position": position}
    source, given, target = models("inattention", changes, {})
    moved = transfer(source.config, given, target, jax.random.key(1))
    assert not moved.fresh and not moved.dropped
    tokens = jnp.arange(9)[None]
    logits = [m.apply(v, tokens).logits for m, v in ((source, given), (target, moved.variables))]
    assert_close(logits[1], logits[0], rel_rms=1e-6)


def test_layers_find_their_place_in_another_pattern():
    given, _, moved = matched("decay", {}, {"pattern": ("decay", "sliding")})
    old = given["params"]["stack"]["0_softmax"]["mixer"]["key"]["kernel"]
    stack = moved.variables["params"]["stack"]
    assert np.array_equal(stack["0_decay"]["mixer"]["key"]["kernel"], old[0::2])
    assert np.array_equal(stack["1_sliding"]["mixer"]["key"]["kernel"], old[1::2])


def test_what_does_not_fit_is_fresh_there_and_dropped_here():
    changes = {"softmax.qk_norm": True, "tie_embeddings": False}
    _, fresh, moved = matched("decay", changes, {"d_ff": 16, "tie_embeddings": True})
    mlp = [f"mlp/{name}/kernel" for name in ("down", "gate", "up")]
    assert {f"params/stack/0_decay/{name}" for name in mlp} <= set(moved.fresh)
    assert set(moved.dropped) == {
        "params/embed/output",
        *(f"params/stack/0_softmax/{name}" for name in mlp),
        "params/stack/0_softmax/mixer/key_norm/scale",
        "params/stack/0_softmax/mixer/query_norm/scale",
    }
    new = "params/stack/0_decay/mlp/up/kernel"
    assert np.array_equal(leaf_of(moved.variables, new), leaf_of(fresh, new))


def test_fields_that_both_have_go_along():
    model = build_model(nested(FIELDS, {"softmax.qk_norm": True})).config
    fields = scheme_fields("sliding", model)
    assert fields["pattern"] == ("sliding",) and fields["sliding.qk_norm"]
    assert (fields["sliding.rope_scaling"], fields["sliding.rope_factor"]) == ("linear", 2.0)
    assert scheme_fields("decay", model)["decay.rope_theta"] == 500.0
    assert scheme_fields("recurrent_memory", model)["memory.mixer"] == "softmax"
    windowed = build_model(nested(FIELDS, {"pattern": ("sliding",)})).config
    assert scheme_fields("recurrent_memory", windowed)["memory.mixer"] == "sliding"
    fields = scheme_fields("inattention", build_model(FIELDS).config)
    assert fields["inattention.score_position"] == "rotary"
    assert fields["inattention.rope_factor"] == 2.0
    relative = build_model(nested(FIELDS, {"softmax.position": "relative"})).config
    assert scheme_fields("inattention", relative) == {"name": "inattention", "pattern": ()}
    for changes in ({"softmax.qk_norm": True}, {"norm": "layer"}):
        with pytest.raises(ValueError, match="norms its memory once"):
            scheme_fields("inattention", build_model(nested(FIELDS, changes)).config)


@pytest.mark.parametrize("changes", [{"name": "decay"}, {"pattern": ("rwkv",)}], ids=str)
def test_only_a_transformer_is_a_start(changes):
    model = build_model(nested(FIELDS, changes)).config
    with pytest.raises(ValueError, match=r"initialised from softmax attention: got .*--from=RUN"):
        scheme_fields("sliding", model)
