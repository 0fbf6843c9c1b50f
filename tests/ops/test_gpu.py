"""What only a GPU can show: cuDNN attention, models on the device (`make gpu-check`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from longctx_jax.ops.attention import attention
from longctx_jax.ops.decay import decay_attention, decay_attention_step, pallas_triton
from longctx_jax.ops.decay.block import walk_blocks
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


KERNELS = ["pallas_triton", "pallas_mosaic_gpu"]


def decay_inputs(kind, dtype, shape=(2, 300, 4, 64), d_value=128):
    batch, seq, heads, d_key = shape
    q, k = (jnp.asarray(make_normal(i, *shape), dtype) for i in range(2))
    v = jnp.asarray(make_normal(2, batch, seq, heads, d_value), dtype)
    decay = jnp.log(jnp.asarray([0.5, 0.9, 0.99, 1.0], jnp.float32))
    if kind == "per_token":
        decay = decay - 0.1 * jnp.abs(jnp.float32(make_normal(3, batch, seq, heads)))
    state = jnp.float32(make_normal(4, batch, heads, d_key, d_value))
    return q, k, v, decay, state


def run_decay(name, arrays, reset=None):
    """Returns (out, state) and all gradients, under fixed cotangents."""

    def run(*arrays):
        return decay_attention(*arrays, reset=reset, implementation=name)

    out, pull = jax.vjp(run, *arrays)
    d_out = make_normal(5, *out[0].shape)
    return out, pull((jnp.asarray(d_out, out[0].dtype), jnp.ones_like(out[1])))


def exact_decay(arrays, reset=None):
    """The same in float64 on the host, from the inputs as rounded."""
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        host = tuple(jnp.asarray(np.asarray(a, np.float64)) for a in arrays)
        reset = None if reset is None else jnp.asarray(np.asarray(reset))
        return jax.tree.map(np.asarray, run_decay("reference", host, reset))


@pytest.mark.parametrize("has_reset", [False, True], ids=["", "reset"])
@pytest.mark.parametrize("kind", ["constant", "per_token"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [*KERNELS, "two_pass", "chunked"])
def test_decay_on_the_device(name, dtype, kind, has_reset):
    if name == "pallas_mosaic_gpu" and dtype == "float32":
        pytest.skip("this kernel takes bfloat16")
    arrays = decay_inputs(kind, dtype)
    reset = jnp.asarray(np.random.default_rng(0).random((2, 300)) < 0.02) if has_reset else None
    actual, expected = run_decay(name, arrays, reset), exact_decay(arrays, reset)
    tolerance = 1e-2 if dtype == "bfloat16" else 3e-3
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, e, rel_rms=tolerance)


@pytest.mark.parametrize("name", KERNELS)
def test_long_sequences_in_segments(name):
    arrays = decay_inputs("constant", "bfloat16", (1, 8192, 4, 64), 64)
    actual, expected = run_decay(name, arrays), run_decay("two_pass", arrays)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, e, rel_rms=2e-2)


@pytest.mark.parametrize("is_backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("width", [64, 128])
def test_triton_with_four_and_eight_warps(width, is_backwards):
    """A known miscompilation of wgmma chains showed up with eight warps only."""
    x, y, z, decay, state = decay_inputs("constant", "bfloat16", (1, 512, 4, width), width)
    expected = walk_blocks(
        *(a.astype(jnp.float32) for a in (x, y, z)),
        decay,
        state,
        reset=None,
        scale=0.1,
        chunk_len=64,
        is_backwards=is_backwards,
    )
    options = {"reset": None, "scale": 0.1, "is_backwards": is_backwards, "out_dtype": x.dtype}
    for n_warps in (4, 8):
        for _ in range(3):  # a race would move
            tiles = pallas_triton.Tiling(64, 64, n_warps, 2)
            out, last = pallas_triton.walk(x, y, z, decay, state, **options, tiles=tiles)
            assert_close(out, expected[0], rel_rms=1e-2)
            assert_close(last, expected[1], rel_rms=1e-2)


def test_step_kernel_on_the_device():
    q, k, v, decay, state = decay_inputs("constant", "bfloat16")
    first = [a[:, 0] for a in (q, k, v)]
    expected = decay_attention_step(*first, decay, state, implementation="recurrent")
    actual = decay_attention_step(*first, decay, state, implementation="pallas_triton")
    assert_close(actual[0], expected[0], rel_rms=1e-2)
    assert_close(actual[1], expected[1], rel_rms=1e-6)


def test_a_million_tokens_forward_and_backward():
    arrays = decay_inputs("constant", "bfloat16", (1, 1 << 20, 4, 64), 64)[:4]

    @jax.jit
    def gradient(q, k, v, decay):
        return jax.grad(
            lambda *a: jnp.sum(decay_attention(*a, decay)[0].astype(jnp.float32) ** 2), (0, 1, 2)
        )(q, k, v)

    gradients = gradient(*arrays)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients)
    plan = gradient.lower(*arrays).compile().memory_analysis()
    inputs = sum(a.nbytes for a in arrays)
    assert plan.temp_size_in_bytes < 4 * inputs  # linear: some copies of the inputs, no more


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
