"""What does not fit together is refused by every model alike, before it gives numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from tests.helpers import in_float64, random_variables

SIZES = {"n_layers": 1, "d_model": 8, "n_heads": 2, "vocab_size": 11, "d_ff": 8}
MODELS = {
    "softmax": {},
    "relative": {"softmax": {"position": "relative"}},
    "sliding": {"pattern": ("sliding",), "sliding": {"window_len": 3}},
    "vq": {"name": "transformer_vq", "vq": {"codebook_size": 3, "window_len": 3}},
    "decay": {"name": "decay"},
    "inattention": {"name": "inattention"},
    "stagformer": {"name": "stagformer", "n_layers": 2},
    "armt": {"name": "recurrent_memory", "memory": {"segment_len": 4, "n_memory_tokens": 1}},
}
TOKENS = np.arange(12, dtype=np.int32).reshape(3, 4) % 11


def make(name="softmax", **changes):
    model = build_model({**SIZES, **MODELS[name], **changes})
    return model, random_variables(lambda: model.init(jax.random.key(0)))


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_never_broadcast(name):
    model, variables = make(name)
    cache = jax.eval_shape(lambda: model.init_cache(1, 8))
    with pytest.raises(ValueError, match=r"same rows: got a cache of 1 .* \(3, 4\)"):
        jax.eval_shape(model.apply, variables, TOKENS, cache)
    for field in ("segment_ids", "weights"):
        one = np.ones((1, 4), np.int32)
        with pytest.raises(ValueError, match=rf"{field} must have one number a token"):
            jax.eval_shape(model.apply, variables, TOKENS, None, **{field: one})


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (4,)], ids=str)
def test_an_empty_call_is_refused(shape):
    model, variables = make()
    with pytest.raises(ValueError, match="at least one row and one token"):
        jax.eval_shape(model.apply, variables, np.zeros(shape, np.int32))


def test_tokens_and_ids_are_integers():
    model, variables = make()
    with pytest.raises(ValueError, match="tokens must be integers: got float32"):
        model.apply(variables, TOKENS.astype(np.float32))
    with pytest.raises(ValueError, match="segment_ids must be integers: got float32"):
        model.apply(variables, TOKENS, segment_ids=TOKENS.astype(np.float32))
    with pytest.raises(ValueError, match="must not be negative: got -1"):
        model.apply(variables, TOKENS, segment_ids=np.int32(TOKENS) - 1)


@pytest.mark.parametrize("dtype", ["bool", "int8", "int16", "uint8", "int32"])
def test_ids_of_any_kind_leave_the_cache_as_it_is(dtype):
    model, variables = make()
    pieces = jnp.moveaxis(jnp.asarray(TOKENS).reshape(3, 2, 2), 1, 0)
    ids = (pieces > 4).astype(dtype)

    def step(cache, piece):
        out = model.apply(variables, piece[0], cache, segment_ids=piece[1])
        return out.cache, out.logits

    _, logits = jax.lax.scan(step, model.init_cache(3, 4), (pieces, ids))
    whole = model.apply(variables, TOKENS, segment_ids=(TOKENS > 4).astype(np.int32)).logits
    np.testing.assert_allclose(jnp.concatenate(list(logits), axis=1), whole, rtol=1e-4, atol=1e-5)


def test_negative_ids_inside_jit_keep_the_split_law():
    """Padding of -1 is a document like others where it cannot be refused."""
    model, variables = make()
    ids = np.array([[0, -1, -1, 2]] * 3, np.int32)
    apply = jax.jit(
        lambda tokens, cache, ids: model.apply(variables, tokens, cache, segment_ids=ids)
    )
    whole = apply(TOKENS, None, ids).logits
    first = apply(TOKENS[:, :2], model.init_cache(3, 4), ids[:, :2])
    second = apply(TOKENS[:, 2:], first.cache, ids[:, 2:])
    both = jnp.concatenate([first.logits, second.logits], axis=1)
    np.testing.assert_allclose(both, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [11, 12, 1000, -1])
def test_a_token_outside_the_vocabulary_is_seen(bad):
    model, variables = make()
    tokens = TOKENS.copy()
    tokens[1, 2] = bad
    logits = np.asarray(model.apply(variables, tokens).logits)
    assert np.isnan(logits[1, 2:]).all()
    assert np.isfinite(logits[[0, 2]]).all()


def test_float64_without_64_bits_is_refused():
    model, (_, variables) = build_model({**SIZES, "dtype": "float64"}), make()
    for call in (
        lambda: model.init(jax.random.key(0)),
        lambda: model.init_cache(1, 4),
        lambda: model.apply(variables, TOKENS),
    ):
        with pytest.raises(ValueError, match="config.model.dtype='float64' needs 64-bit types"):
            call()
    assert in_float64(lambda: model.apply(variables, TOKENS).logits.dtype)() == jnp.float64


@pytest.mark.parametrize("name", ["inattention", "stagformer", "armt"])  # mixers: tests/laws
def test_parameters_are_float32_where_64_bits_are_enabled(name):
    model, _ = make(name)
    shapes = in_float64(lambda: jax.eval_shape(model.init, jax.random.key(0)))()
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layerwise", "rmt"])
def test_memory_tokens_are_float32_where_64_bits_are_enabled(name):
    memory = {"segment_len": 4, "n_memory_tokens": 1, "kind": name}
    model = build_model({**SIZES, "name": "recurrent_memory", "memory": memory})
    shapes = in_float64(lambda: jax.eval_shape(model.init, jax.random.key(0)))()
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
