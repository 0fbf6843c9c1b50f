"""What only a GPU can show: cuDNN attention, models on the device (`make gpu-check`)."""

import jax
import jax.numpy as jnp
import pytest

from longctx_jax.models import build_model
from longctx_jax.ops.attention import attention
from longctx_jax.ops.decay import decay_attention
from tests.helpers import assert_close, make_normal

pytestmark = pytest.mark.gpu


def inputs(seq, heads, kv_heads, width):
    shapes = [(2, seq, heads, width), (2, seq, kv_heads, width), (2, seq, kv_heads, width)]
    return [jnp.asarray(make_normal(i, *s), jnp.bfloat16) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("window_len", [0, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_cudnn_equals_the_definition(heads, window_len):
    arrays = inputs(256, *heads, 64)

    def loss(implementation):
        def run(*qkv):
            out = attention(*qkv, window_len=window_len, implementation=implementation)
            return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

        return jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(*arrays)

    (_, out), grads = loss("cudnn")
    (_, expected), expected_grads = loss("dense")
    assert_close(out, expected, rel_rms=1e-2)
    for g, e in zip(grads, expected_grads, strict=True):
        assert_close(g, e, rel_rms=2e-2)


def test_gradients_through_a_cache_are_those_of_one_call():
    """Merging differentiates the normaliser, which cuDNN's backward pass would ignore."""
    model = build_model({"n_layers": 1, "d_model": 128, "n_heads": 2, "dtype": "bfloat16"})
    params = model.init(jax.random.key(0))["params"]
    tokens = jax.random.randint(jax.random.key(1), (2, 96), 0, 256)

    def whole(params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, tokens).logits))

    def pieces(params):
        first = model.apply({"params": params}, tokens[:, :40], model.init_cache(2, 96))
        rest = model.apply({"params": params}, tokens[:, 40:], first.cache)
        return jnp.sum(jnp.sin(first.logits)) + jnp.sum(jnp.sin(rest.logits))

    expected, actual = jax.jit(jax.grad(whole))(params), jax.jit(jax.grad(pieces))(params)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, e, rel_rms=5e-2)


def test_chunked_decay_on_the_device():
    query, key, value = inputs(300, 4, 4, 64)
    log_decay = jnp.log(jnp.asarray([0.5, 0.9, 0.99, 1.0]))
    out, state = decay_attention(query, key, value, log_decay, implementation="chunked")
    wide = [x.astype(jnp.float32) for x in (query, key, value)]
    with jax.default_matmul_precision("highest"):
        expected, expected_state = decay_attention(*wide, log_decay, implementation="reference")
    assert_close(out, expected, rel_rms=1e-2)
    assert_close(state, expected_state, rel_rms=1e-2)


@pytest.mark.parametrize("pattern", [("softmax",), ("decay", "sliding")], ids=str)
def test_split_law_in_bfloat16(pattern):
    model = build_model(
        {"pattern": pattern, "n_layers": 2, "d_model": 128, "n_heads": 2, "dtype": "bfloat16"}
    )
    variables = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 96), 0, 256)
    whole = model.apply(variables, tokens).logits
    cache, pieces = model.init_cache(2, 96), []
    for piece in (tokens[:, :50], tokens[:, 50:51], tokens[:, 51:]):
        out = model.apply(variables, piece, cache)
        cache = out.cache
        pieces.append(out.logits)
    assert_close(jnp.concatenate(pieces, axis=1), whole, rel_rms=3e-2)
