"""The Triton kernels: numerics in the interpreter, and that they lower for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops.decay import pallas_triton, pallas_triton_step, recurrent
from longctx_jax.ops.decay.block import walk_blocks
from longctx_jax.ops.decay.facts import Facts
from longctx_jax.ops.decay.linear_vjp import share_heads
from longctx_jax.ops.decay.pallas_triton import Tiling
from longctx_jax.ops.decay.reference import decay_attention_reference
from tests.helpers import assert_trees_close, lower_for_cuda, make_normal

LOG_DECAYS = np.array([np.log(0.9), -0.01, 0.0, -np.inf])
# name -> seq, key, value, decay, has resets, has a state, tiling
WALKS = {
    "one_token": (1, 16, 16, "constant", False, True, Tiling(64, 16, 4, 2)),
    "chunk": (64, 16, 32, "constant", False, True, Tiling(64, 16, 4, 2)),
    "odd_widths": (65, 20, 24, "constant", True, True, Tiling(64, 32, 4, 2)),
    "segments": (300, 16, 16, "constant", False, True, Tiling(32, 16, 4, 2, 4)),
    "segments_even": (256, 16, 16, "per_token", False, False, Tiling(64, 16, 4, 2, 2)),
    "everything": (301, 16, 32, "per_token", True, True, Tiling(64, 16, 4, 2, 3)),
}


def make_walk(name, dtype="float32"):
    """Returns (x, y, z, log_decay, state), reset and the tiling; heads are shared."""
    seq, d_key, d_value, kind, has_reset, has_state, tiles = WALKS[name]
    x, y = make_normal(0, 2, seq, 2, d_key), make_normal(1, 2, seq, 4, d_key)
    z, state = make_normal(2, 2, seq, 1, d_value), make_normal(3, 2, 4, d_key, d_value)
    decay = LOG_DECAYS
    if kind == "per_token":
        decay = -0.5 * np.abs(make_normal(4, 2, seq, 4))
        decay[:, seq // 3, 0] = -79.0
    reset = jnp.asarray(np.random.default_rng(0).random((2, seq, 1)) < 0.03)
    arrays = [jnp.asarray(a, dtype) for a in (x, y, z)]
    state = jnp.float32(state) if has_state else None
    return (*arrays, jnp.float32(decay), state), reset if has_reset else None, tiles


def both_walks(name, is_backwards, dtype="float32"):
    (x, y, z, decay, state), reset, tiles = make_walk(name, dtype)
    options = {"reset": reset, "scale": 0.7, "is_backwards": is_backwards}

    @jax.jit
    def kernel(x, y, z, decay, state):
        given = {"out_dtype": jnp.float32, "interpret": True, "tiles": tiles}
        return pallas_triton.walk(x, y, z, decay, state, **options, **given)

    @jax.jit
    def plain(*arrays):
        wide = [share_heads(a.astype(jnp.float32), 4) for a in arrays[:3]]
        return walk_blocks(*wide, *arrays[3:], chunk_len=50, **options)

    return kernel(x, y, z, decay, state), plain(x, y, z, decay, state)


FAST = {"one_token": (False, True), "segments_even": (False,), "everything": (False, True)}


@pytest.mark.parametrize(
    ("name", "is_backwards"),
    [
        pytest.param(
            name,
            is_backwards,
            id=f"{name}-{'backwards' if is_backwards else 'forwards'}",
            marks=() if is_backwards in FAST.get(name, ()) else pytest.mark.slow,
        )
        for name in WALKS
        for is_backwards in (False, True)
    ],
)
def test_walk(name, is_backwards):
    actual, expected = both_walks(name, is_backwards)
    assert_trees_close(actual, expected, rel_rms=1e-6)  # seen: 3e-7


def test_walk_in_bfloat16():
    actual, expected = both_walks("everything", True, "bfloat16")
    assert_trees_close(actual, expected, rel_rms=5e-3)  # seen: 3e-3


@pytest.mark.parametrize("kind", ["constant", pytest.param("per_token", marks=pytest.mark.slow)])
def test_gradients(kind):
    (q, k, v, decay, state), reset, _ = make_walk("everything" if kind == "per_token" else "chunk")
    cotangents = jnp.float32(make_normal(5, 2, *q.shape[1:2], 4, v.shape[3])), 0.5 * state

    def pull(run, *arrays):
        out, pull = jax.vjp(run, *arrays)
        return out, pull(cotangents)

    def kernel(*arrays):
        run = functools.partial(
            pallas_triton.decay_attention_pallas_triton, reset=reset, scale=0.3, interpret=True
        )
        return run(*arrays)

    def plain(q, k, v, decay, state):
        q, k, v = (share_heads(a, 4) for a in (q, k, v))
        return decay_attention_reference(q, k, v, decay, state, reset=reset, scale=0.3)

    arrays = (q, k, v, decay, state)
    actual = jax.jit(functools.partial(pull, kernel))(*arrays)
    expected = jax.jit(functools.partial(pull, plain))(*arrays)
    assert_trees_close(actual[0], expected[0], rel_rms=1e-6)
    assert_trees_close(actual[1], expected[1], rel_rms=1e-5)  # seen: 2e-6, the decay's


@pytest.mark.slow
def test_gradient_through_vmap_without_a_state():
    q, k, v = (jnp.float32(make_normal(i, 3, 1, 40, 2, 16)) for i in range(3))
    decay = -jnp.float32([[0.1, 0.0], [0.2, 0.01], [1.0, 0.3]])

    def loss(run, q, k, v, decay):
        out, state = run(q, k, v, decay, scale=0.3)
        return jnp.sum(jnp.sin(out)) + jnp.sum(state**2)

    def gradients(run):
        gradient = jax.grad(functools.partial(loss, run), argnums=range(4))
        return jax.jit(jax.vmap(gradient))(q, k, v, decay)

    run = functools.partial(pallas_triton.decay_attention_pallas_triton, interpret=True)
    assert_trees_close(gradients(run), gradients(decay_attention_reference), rel_rms=1e-5)


def test_a_decay_that_is_not_differentiated_costs_no_pass():
    x = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.bfloat16)

    def run(argnums):
        def loss(q, k, v, g):
            run = pallas_triton.decay_attention_pallas_triton
            return jnp.sum(run(q, k, v, g, scale=1.0, interpret=True)[0].astype(jnp.float32))

        decay = jax.ShapeDtypeStruct((2,), jnp.float32)
        return str(jax.make_jaxpr(jax.grad(loss, argnums=argnums))(x, x, x, decay))

    narrow, both = run((0, 1, 2)), run((0, 1, 2, 3))
    assert both.count("dot_general") > narrow.count("dot_general") + 4  # of the two-pass form


@pytest.mark.parametrize(("kind", "has_reset"), [("constant", True), ("per_token", False)])
def test_step(kind, has_reset):
    q, k = (jnp.float32(make_normal(i, 2, 4, 20)) for i in range(2))
    v, state = jnp.float32(make_normal(2, 2, 4, 48)), jnp.float32(make_normal(3, 2, 4, 20, 48))
    decay = jnp.float32(LOG_DECAYS)
    if kind == "per_token":
        decay = -jnp.abs(jnp.float32(make_normal(4, 2, 4)))
    options = {"scale": 0.3, "reset": jnp.asarray([[True], [False]]) if has_reset else None}
    actual = pallas_triton_step.step(q, k, v, decay, state, **options, interpret=True)
    expected = recurrent.step(q, k, v, decay, state, **options)
    assert_trees_close(actual, expected, rel_rms=1e-6)


TARGET = "__gpu$xla.gpu.triton"


@pytest.mark.parametrize("is_backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    ("dtype", "d_key", "d_value", "seq", "kind"),
    [
        ("bfloat16", 64, 64, 4096, "constant"),
        ("bfloat16", 128, 128, 1000, "per_token"),
        pytest.param("bfloat16", 16, 64, 4096, "per_token", marks=pytest.mark.slow),
        pytest.param("bfloat16", 256, 256, 128, "constant", marks=pytest.mark.slow),
        pytest.param("float32", 64, 128, 1000, "constant", marks=pytest.mark.slow),
        ("float32", 128, 128, 4096, "per_token"),
    ],
)
def test_walk_lowers_for_cuda(dtype, d_key, d_value, seq, kind, is_backwards):
    x = jax.ShapeDtypeStruct((1, seq, 4, d_key), dtype)
    z = jax.ShapeDtypeStruct((1, seq, 4, d_value), dtype)
    decay = jax.ShapeDtypeStruct((4,) if kind == "constant" else (1, seq, 4), jnp.float32)
    state = jax.ShapeDtypeStruct((1, 4, d_key, d_value), jnp.float32)
    run = functools.partial(
        pallas_triton.walk, reset=None, scale=1.0, is_backwards=is_backwards, out_dtype=dtype
    )
    text = lower_for_cuda(run, x, x, z, decay, state)
    is_cut = pallas_triton.tiling(d_key, d_value, dtype, 4, seq).n_segments > 1
    assert text.count(TARGET) == 1 + is_cut


def test_step_lowers_for_cuda():
    x = jax.ShapeDtypeStruct((2, 4, 64), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((2, 4, 64, 64), jnp.float32)
    decay = jax.ShapeDtypeStruct((4,), jnp.float32)
    run = functools.partial(pallas_triton_step.step, scale=1.0)
    assert lower_for_cuda(run, x, x, x, decay, state).count(TARGET) == 1


@pytest.mark.parametrize("n_rows", [1, 16, 64, 256])
@pytest.mark.parametrize("seq", [1, 64, 8192])
def test_segments_fill_the_device_and_no_more(n_rows, seq):
    tiles = pallas_triton.tiling(64, 64, jnp.bfloat16, n_rows, seq)
    assert tiles.n_segments == 1 or n_rows * tiles.n_segments <= 2 * 132
    assert tiles.n_segments <= max(1, seq // (4 * tiles.chunk_len))
    if seq == 8192 and n_rows == 16:
        assert tiles.n_segments == 16
    if n_rows == 256:
        assert tiles.n_segments == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "cpu"}, "jax runs on cpu"),
        ({"dtype": "float16"}, "not float16"),
        ({"d_key": 512}, "do not fit the registers: 512"),
        ({"dtype": "float32", "d_value": 256}, "wider than 128"),
        ({"dtype": "float32", "matmul_precision": "highest"}, "precision is highest"),
        ({}, ""),
    ],
    ids=["cpu", "half", "wide", "wide32", "precise", "fine"],
)
def test_unsupported(changes, reason):
    facts = {"platform": "gpu", "device": "NVIDIA H200", "dtype": "bfloat16"}
    shape = {"batch": 1, "seq": 64, "heads": 2, "d_key": 64, "d_value": 64}
    said = pallas_triton.unsupported(Facts(**(facts | shape | changes)))
    assert reason in said and bool(said) == bool(reason)
