"""The Mosaic GPU kernel of decay attention without a GPU: its numbers interpreted, its lowering."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from longctx_jax.ops.decay.block import walk_blocks
from longctx_jax.ops.decay.facts import Facts
from longctx_jax.ops.decay.kernel_inputs import MAX_SEGMENTS, segment_count
from longctx_jax.ops.decay.pallas_mosaic_gpu import (
    decay_attention_pallas_mosaic_gpu,
    unsupported,
    walk,
)
from longctx_jax.ops.decay.reference import decay_attention_reference
from tests.helpers import assert_close, make_normal

TOLERANCE = 4e-3  # of bfloat16 products; seen: 2.6e-3
GRADIENT_TOLERANCE = 8e-3  # seen: 2.6e-3
HAS_INTERPRETER = jax.__version_info__ >= (0, 11, 2)
needs_interpreter = pytest.mark.skipif(
    not HAS_INTERPRETER, reason="the GPU interpreter of Pallas is public from jax 0.11.2 on"
)
IS_NEW = jax.__version_info__ >= (0, 11)
# No decay at all, full decay, a strong one, a usual one.
LOG_DECAYS = np.array([-0.0, -np.inf, -8.0, np.log(0.97)], np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A shape and what comes with it; heads of x, y and z."""

    seq: int
    heads: tuple[int, int, int] = (4, 4, 4)
    d_key: int = 64
    d_value: int = 64
    batch: int = 1
    per_token: bool = False
    resets: bool = False
    has_state: bool = True
    out_dtype: str = "bfloat16"
    n_segments: int | None = None
    n_warpgroups: int | None = None


CASES = {
    "one_chunk": Case(64, has_state=False),
    "ragged": Case(150, heads=(2, 4, 1), out_dtype="float32"),
    "short": Case(3, has_state=False),
    "per_token": Case(128, per_token=True),
    "per_token_resets": Case(140, batch=2, heads=(1, 2, 2), per_token=True, resets=True),
    "resets": Case(140, heads=(4, 1, 4), resets=True),
    "wide": Case(128, heads=(2, 2, 4), d_key=128, d_value=128),
    "wide_one_warpgroup": Case(128, d_key=128, d_value=128, n_warpgroups=1),
    "wide_segments": Case(330, d_value=128, per_token=True, resets=True, n_segments=3),
    "odd_widths": Case(70, d_key=80, d_value=40),
    "segments": Case(300, per_token=True, resets=True, n_segments=3),
    "segments_constant": Case(256, n_segments=2, has_state=False, out_dtype="float32"),
}
FAST = {  # the others are slow only because there are many
    ("one_chunk", False),
    ("ragged", False),
    ("ragged", True),
    ("segments", False),
    ("per_token_resets", True),
    ("wide", True),
    ("odd_widths", False),
    ("segments", True),
}


def make_inputs(case: Case):
    """Returns x, y, z, log_decay, state and reset as jax arrays."""
    widths = case.d_key, case.d_key, case.d_value
    tokens = [
        jnp.asarray(make_normal(i, case.batch, case.seq, heads, width), jnp.bfloat16)
        for i, (heads, width) in enumerate(zip(case.heads, widths, strict=True))
    ]
    n_heads, log_decay = len(LOG_DECAYS), LOG_DECAYS
    if case.per_token:
        shape = (case.batch, case.seq, n_heads)
        steps = np.random.default_rng(7).exponential(size=shape)
        log_decay = -steps * np.array([1e-3, 0.05, 1.0, 20.0])
    state = reset = None
    if case.has_state:
        state = jnp.float32(make_normal(4, case.batch, n_heads, case.d_key, case.d_value))
    if case.resets:
        reset = jnp.asarray(np.random.default_rng(8).random((case.batch, case.seq, 1)) < 0.04)
    return *tokens, jnp.float32(log_decay), state, reset


def expected_walk(x, y, z, log_decay, state, **options):
    """`walk_blocks` in float32 on the same rounded inputs, every head with its own copy."""
    n_heads = log_decay.shape[-1]
    x, y, z = (jnp.repeat(a.astype(jnp.float32), n_heads // a.shape[2], axis=2) for a in (x, y, z))
    return jax.jit(functools.partial(walk_blocks, chunk_len=64, **options))(
        x, y, z, log_decay, state
    )


@pytest.fixture
def interpret():
    """Parameters of the interpreter with its race detector on; fails if there was a race."""
    yield plgpu.InterpretGPUParams(detect_races=True)
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    races = gpu_callbacks.get_races()
    assert races is None or not races.races_found
    gpu_callbacks.reset_gpu_interpret_mode_state()


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "is_backwards"),
    [
        pytest.param(
            name,
            is_backwards,
            id=f"{name}-{'backwards' if is_backwards else 'forwards'}",
            marks=() if (name, is_backwards) in FAST else pytest.mark.slow,
        )
        for name in CASES
        for is_backwards in (False, True)
    ],
)
def test_walk(name, is_backwards, interpret):
    case = CASES[name]
    *arrays, reset = make_inputs(case)
    options = {"reset": reset, "scale": 0.3, "is_backwards": is_backwards}
    run = functools.partial(
        walk,
        interpret=interpret,
        n_segments=case.n_segments,
        n_warpgroups=case.n_warpgroups,
        out_dtype=case.out_dtype,
        **options,
    )
    out, last = jax.jit(run)(*arrays)
    assert out.dtype == case.out_dtype and last.dtype == jnp.float32
    expected, expected_last = expected_walk(*arrays, out_dtype=jnp.float32, **options)
    for head in range(len(LOG_DECAYS)):  # strong decay must not hide behind weak decay
        assert_close(out[:, :, head], expected[:, :, head], rel_rms=TOLERANCE)
        assert_close(last[:, head], expected_last[:, head], rel_rms=TOLERANCE)


@needs_interpreter
def test_gradients(interpret):
    case = Case(70, heads=(2, 1, 2), d_value=100, per_token=True, resets=True)
    query, key, value, log_decay, state, reset = make_inputs(case)
    log_decay, state = log_decay[..., :2], state[:, :2]
    d_out, d_last = make_normal(5, 1, 70, 2, 100), jnp.float32(make_normal(6, *state.shape))

    def pull(function, *arrays):
        def run(*arrays):
            return function(*arrays, reset=reset, scale=0.2)

        (out, _), back = jax.vjp(run, *arrays)
        return back((jnp.asarray(d_out, out.dtype), d_last))

    def reference(query, key, value, *rest, **options):
        key = jnp.repeat(key, 2, axis=2)
        return decay_attention_reference(query, key, value, *rest, **options)

    kernel = functools.partial(decay_attention_pallas_mosaic_gpu, interpret=interpret)
    arrays = (query, key, value, log_decay, state)
    actual = jax.jit(functools.partial(pull, kernel))(*arrays)
    wide = [a.astype(jnp.float32) for a in arrays]
    d_out = np.asarray(jnp.asarray(d_out, jnp.bfloat16), np.float32)
    expected = jax.jit(functools.partial(pull, reference))(*wide)
    for a, e, array in zip(actual, expected, arrays, strict=True):
        assert a.dtype == array.dtype
        assert_close(a, e, rel_rms=GRADIENT_TOLERANCE)


@needs_interpreter
@pytest.mark.slow
def test_vmap(interpret):
    case = Case(70, per_token=True)
    arrays = [jnp.stack([a, a[:, ::-1]]) for a in make_inputs(case)[:4]]

    def run(*arrays):
        return decay_attention_pallas_mosaic_gpu(*arrays, scale=0.3, interpret=interpret)[0]

    actual = jax.vmap(run)(*arrays)
    for i in range(2):
        np.testing.assert_array_equal(actual[i], run(*(a[i] for a in arrays)))


def lowered(*shapes, **options) -> str:
    """Returns the text of a walk lowered for an H200, on any machine."""
    context = contextlib.nullcontext()
    if IS_NEW:
        from jax.sharding import AbstractDevice, AbstractMesh, AxisType

        device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
        mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
        context = jax.sharding.use_abstract_mesh(mesh)
    with context:
        run = jax.jit(functools.partial(walk, reset=None, scale=0.1, **options))
        return run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("is_backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("per_token", [False, True], ids=["constant", "per_token"])
@pytest.mark.parametrize("width", [64, 128])
def test_lowers_for_cuda(width, per_token, is_backwards):
    seq, heads = 1000, 3
    tokens = jax.ShapeDtypeStruct((1, seq, heads, width), jnp.bfloat16)
    decay = jax.ShapeDtypeStruct((1, seq, heads) if per_token else (heads,), jnp.float32)
    state = jax.ShapeDtypeStruct((1, heads, width, width), jnp.float32)
    out_dtype = "float32" if is_backwards else "bfloat16"
    text = lowered(
        *(tokens, tokens, tokens, decay, state), is_backwards=is_backwards, out_dtype=out_dtype
    )
    assert text.count("@mosaic_gpu") == 2  # states of the segments, and the walk itself


@pytest.mark.parametrize("n_warpgroups", [1, 2])
def test_lowers_for_cuda_without_segments(n_warpgroups):
    tokens = jax.ShapeDtypeStruct((1, 128, 2, 128), jnp.bfloat16)
    decay = jax.ShapeDtypeStruct((2,), jnp.float32)
    text = lowered(
        *(tokens, tokens, tokens, decay, None),
        is_backwards=False,
        out_dtype="bfloat16",
        n_segments=1,
        n_warpgroups=n_warpgroups,
    )
    assert text.count("@mosaic_gpu") == 1


def test_segments_fill_the_device_and_are_not_tiny():
    assert segment_count(132, 1000) == 1
    assert segment_count(66, 1000) == 4
    assert segment_count(1, 1000) == MAX_SEGMENTS
    assert segment_count(1, 9) == 2
    assert segment_count(1, 3) == 1


FACTS = Facts("gpu", "NVIDIA H200", "bfloat16", 1, 4096, 16, 128, 128)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"device": "NVIDIA H100 80GB HBM3"}, ""),
        ({"device": "NVIDIA GH200 480GB"}, ""),
        ({"is_per_token": True, "d_key": 72}, ""),
        ({"platform": "cpu", "device": "cpu"}, "jax runs on cpu"),
        ({"device": "NVIDIA A100-SXM4-80GB"}, "not NVIDIA A100"),
        ({"device": "NVIDIA GB200"}, "not NVIDIA GB200"),
        ({"dtype": "float32"}, "takes bfloat16, not float32"),
        ({"d_value": 136}, "wider than 128: key 128, value 136"),
    ],
)
def test_unsupported(change, reason):
    actual = unsupported(dataclasses.replace(FACTS, **change))
    assert reason in actual and bool(reason) == bool(actual)


@pytest.mark.parametrize(("dtype", "width"), [("float32", 64), ("bfloat16", 130)])
def test_refuses(dtype, width):
    x = jnp.zeros((1, 2, 1, width), dtype)
    with pytest.raises(NotImplementedError, match="must be bfloat16|may be 128 wide"):
        decay_attention_pallas_mosaic_gpu(x, x, x, jnp.zeros(1), scale=1.0)
