"""What only a GPU can show: cuDNN attention, models on the device (`make gpu-check`)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from longctx_jax.ops.attention import attention
from longctx_jax.ops.decay import decay_attention, decay_attention_step, pallas_triton
from longctx_jax.ops.decay.block import walk_blocks
from longctx_jax.ops.flash_decoding import attend
from longctx_jax.ops.vq import blocks as vq_blocks
from longctx_jax.ops.vq import pallas_triton as vq_kernels
from longctx_jax.ops.vq.codebook import quantize
from longctx_jax.ops.vq.table import Table, tables_before_blocks
from tests.helpers import assert_close, in_float64, make_normal
from tests.ops.test_flash_decoding import Case, cast, definition, make_call

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


@pytest.mark.parametrize("case", [Case(1, 8, 4, 5000, 64, 64, layers=3),
    Case(3, 1, 32, 4096, 512, 512, is_shared=True, bias="near"),
    Case(1, 1, 32, 5000, 576, 512, is_shared=True, bias="buckets"),
    Case(1, 1, 32, 4096, 2048, 2048, is_shared=True, bias="slopes"),
    Case(2, 1, 20, 1024, 128, 128)], ids=str)  # fmt: skip
def test_flash_decoding_on_the_device(case):
    """bfloat16 against float64; hidden keys, whole hidden tiles, rows that are keys and values."""
    arrays = cast(make_call(case), "bfloat16")
    layer = jnp.asarray(1) if case.layers else None
    run = functools.partial(attend, scale=0.3, d_value=case.d_value, layer=layer)
    found = jax.jit(lambda *a: run(*a, arrays[4]))(*arrays[:4])
    exact = in_float64(lambda: definition(case, *cast(arrays, np.float64)))()
    for actual, expected in zip(found, exact, strict=True):
        assert_close(actual, expected, rel_rms=1e-2)


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


# name -> blocks, kv_heads, group, block, before, key, value, codes, distances
VQ_CALLS = {
    "heads": (4, 2, 1, 256, 256, 64, 64, 256, 257),
    "wide_heads": (3, 2, 1, 256, 256, 128, 128, 512, 257),
    "group": (3, 1, 4, 128, 256, 64, 128, 128, 200),
    "gated": (3, 1, 1, 256, 256, 128, 768, 256, 257),
    "ragged": (3, 2, 2, 100, 200, 48, 40, 90, 150),
    "no_bias": (3, 1, 1, 256, 256, 128, 64, 256, 0),
}
VQ_WINDOW = 200


def vq_call(name, dtype):
    """Returns rules, blocks, constants and the gradient of the result; codewords as rounded."""
    n_blocks, heads, group, block, before, d_key, d_value, codes, distances = VQ_CALLS[name]
    batch, n_keys = 2, before + n_blocks * block
    rows = (n_blocks, batch, heads, group, block)
    shapes = [(*rows, d_key), (batch, heads, n_keys, d_key), (batch, heads, n_keys, d_value)]
    shapes += [(*rows, distances), (n_blocks, batch, heads, codes, d_value), (heads, codes, d_key)]
    arrays = [jnp.asarray(make_normal(i, *shape), dtype) for i, shape in enumerate(shapes)]
    query, key, value, bias, mean, codebook = arrays
    random = np.random.default_rng(0)
    document = np.sort(random.integers(0, 3, (batch, n_blocks * block)), axis=1)
    of_rows = np.moveaxis(document.reshape(batch, n_blocks, block), 1, 0).copy()
    of_rows[-1, :, -3:] = -2
    of_keys = np.concatenate([np.full((batch, before), -1), document], axis=1)
    of_keys[:, before // 2 : before] = document[:, :1]
    of_keys[:, -3:] = -1
    count = random.integers(0, 4, (n_blocks, batch, heads, codes))
    integers = [jnp.int32(x) for x in (count, of_rows, of_keys, of_rows[:, :, 0])]
    blocks = vq_blocks.Blocks(
        query, key, value, bias if distances else None, mean.astype(jnp.float32)
    )
    d_out = jnp.asarray(make_normal(9, *rows, d_value), dtype)
    return blocks, vq_blocks.Constants(codebook, *integers), d_out


def vq_pull(attend, rules, blocks, constants, d_out):
    out, pull = jax.vjp(lambda blocks: attend(rules, blocks, constants), blocks)
    return out, pull(d_out)[0]


def exact_vq(rules, blocks, constants, d_out):
    """In float64 on the host; the means as rounded to the dtype of products."""
    dtype = blocks.value.dtype
    blocks = blocks._replace(mean=blocks.mean.astype(dtype))

    def widen(x):
        return np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None)

    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        host = jax.tree.map(lambda x: jnp.asarray(widen(x)), (blocks, constants, d_out))
        result = vq_pull(vq_blocks.attend_blocks, rules, *host)
        return jax.tree.map(np.asarray, result)


VQ_TOLERANCE = {"bfloat16": (1e-2, 2e-2), "float32": (3e-3, 5e-3)}  # of values, of gradients


@pytest.mark.parametrize("rule", ["", "window", "local_gradients"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", VQ_CALLS)
def test_vq_attention_kernels_on_the_device(name, dtype, rule):
    rules = vq_blocks.Rules(VQ_WINDOW, 0.1, rule != "window", rule != "local_gradients")
    call = vq_call(name, dtype)
    actual = jax.jit(functools.partial(vq_pull, vq_kernels.attend_blocks, rules))(*call)
    expected = exact_vq(rules, *call)
    of_values, of_gradients = VQ_TOLERANCE[dtype]
    assert_close(actual[0], expected[0], rel_rms=of_values)
    for a, e in zip(jax.tree.leaves(actual[1]), jax.tree.leaves(expected[1]), strict=True):
        assert_close(a, e, rel_rms=of_gradients)


@pytest.mark.parametrize("name", ["heads", "wide_heads", "gated"])
def test_vq_attention_with_four_and_eight_warps(name, monkeypatch):
    """A known miscompilation of wgmma chains showed up with eight warps only."""
    rules = vq_blocks.Rules(VQ_WINDOW, 0.1, True, True)
    call = vq_call(name, "bfloat16")
    expected = exact_vq(rules, *call)
    chosen = vq_kernels.tiling
    for n_warps in (4, 8):
        monkeypatch.setattr(
            vq_kernels,
            "tiling",
            lambda *facts, n=n_warps: dataclasses.replace(chosen(*facts), n_warps=n),
        )
        run = jax.jit(functools.partial(vq_pull, vq_kernels.attend_blocks, rules))
        for _ in range(3):  # a race would move
            actual = run(*call)
            for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                assert_close(a, e, rel_rms=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("d_key", [64, 100, 128])
def test_vq_search_is_as_good_as_in_float64(d_key, dtype):
    """Where codes differ from the nearest one's, they are as near up to rounding."""
    vectors = jnp.asarray(make_normal(0, 3001, 2, d_key), dtype)
    codebook = jnp.float32(make_normal(1, 2, 500, d_key))
    codes, error = jax.jit(vq_kernels.search_codes_and_errors)(vectors, codebook)
    x, c = np.asarray(vectors, np.float64), np.asarray(codebook, np.float64)
    distance = (x**2).sum(-1)[..., None] - 2 * np.einsum("thk,hzk->thz", x, c) + (c**2).sum(-1)
    chosen = np.take_along_axis(distance, np.asarray(codes)[..., None], -1)[..., 0]
    assert np.max(chosen - distance.min(-1)) < 1e-5 * d_key
    assert np.mean(np.asarray(codes) != distance.argmin(-1)) < 1e-3
    assert_close(error, quantize(vectors, codebook, codes).squared_error, rel_rms=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("d_value", [64, 768])
def test_vq_tables_on_the_device(d_value, dtype):
    n_blocks, batch, heads, block, n_codes = 5, 2, 2, 200, 250
    random = np.random.default_rng(0)
    documents = np.sort(random.integers(0, 4, (batch, n_blocks * block)), axis=1)
    documents = jnp.int32(np.moveaxis(documents.reshape(batch, n_blocks, block), 1, 0))
    codes = jnp.int32(random.integers(0, n_codes, (n_blocks, batch, heads, block)))
    value = jnp.asarray(make_normal(0, n_blocks, batch, heads, block, d_value), dtype)
    first = Table(
        jnp.float32(make_normal(1, batch, heads, n_codes, d_value)),
        jnp.int32(random.integers(0, 3, (batch, heads, n_codes))),
        jnp.int32([0, -1]),
    )
    d_mean = jnp.float32(make_normal(2, n_blocks + 1, *first.mean.shape))

    def run(build):
        def means(mean, value):
            table = build(first._replace(mean=mean), codes, value, documents)
            return table.mean, table.count

        _, pull, count = jax.vjp(means, first.mean, value, has_aux=True)
        return means(first.mean, value)[0], count, pull(d_mean)

    actual = jax.jit(lambda: run(vq_kernels.tables_before_blocks))()
    expected = jax.jit(lambda: run(tables_before_blocks))()
    np.testing.assert_array_equal(actual[1], expected[1])
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert_close(a, e, rel_rms=1e-2 if a.dtype == jnp.bfloat16 else 1e-5)


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
