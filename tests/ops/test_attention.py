"""Every form of exact attention against a loop over queries and keys, and its gradients."""

import functools
import math
import os
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from longctx_jax.ops import attention as ops
from longctx_jax.ops import dispatch
from longctx_jax.ops.attention import (
    Keys,
    Partial,
    attention,
    attention_partial,
    forms,
    select,
)
from longctx_jax.ops.position import DistanceBias
from tests.helpers import assert_close, assert_trees_close, in_float64, make_normal
from tests.tiny import PROJECT

BLOCK = 4  # tokens a block or tile in these tests
TOLERANCE = 1e-6  # float32 against float64; seen: at most 4e-7
BFLOAT16_TOLERANCE = {"out": 5e-3, "gradient": 1e-2}  # seen: 3e-3 and 4e-3
FORMS = ("dense", "banded", "blockwise")

# name -> batch, seq, heads, kv_heads, d_key, d_value, window_len, segments, bias buckets
SHAPES = {
    "one_token": (2, 1, 2, 2, 4, 4, 3, False, 0),
    "block_minus_1": (1, BLOCK - 1, 1, 1, 4, 6, 2, False, 0),
    "block": (2, BLOCK, 4, 2, 4, 3, 4, True, 0),
    "block_plus_1": (2, BLOCK + 1, 4, 1, 3, 5, 1, False, 8),
    "full": (1, 11, 2, 2, 4, 4, 0, False, 0),
    "full_mqa_bias": (2, 9, 3, 1, 2, 4, 0, True, 32),
    "window": (2, 3 * BLOCK + 1, 4, 2, 4, 5, 3, True, 6),
    "window_is_tile": (1, 2 * BLOCK, 1, 1, 5, 2, BLOCK, False, 0),
    "window_over_seq": (1, 6, 2, 1, 4, 4, 7, True, 0),
}
# The other cases are slow only because each compiles its own program.
FAST = {
    "dense": ("window",),
    "banded": ("one_token", "block_plus_1", "window"),
    "blockwise": ("one_token", "block_plus_1", "full_mqa_bias", "window"),
}
CASES = [
    pytest.param(
        form,
        shape,
        id=f"{form}-{shape}",
        marks=() if shape in FAST[form] else pytest.mark.slow,
    )
    for form in FORMS
    for shape in SHAPES
    if form != "banded" or SHAPES[shape][6]
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Makes a few tokens span several blocks."""
    monkeypatch.setattr(forms, "KEY_BLOCK_LEN", BLOCK)
    monkeypatch.setattr(forms, "MIN_BAND_LEN", BLOCK)


def make_inputs(shape):
    """Returns float64 query, key, value and bias (or None), segment ids, window, cotangents."""
    batch, seq, heads, kv_heads, d_key, d_value, window_len, has_segments, n_buckets = SHAPES[shape]
    seed = zlib.crc32(shape.encode())
    q = make_normal(seed, batch, seq, heads, d_key)
    k = make_normal(seed + 1, batch, seq, kv_heads, d_key)
    v = make_normal(seed + 2, batch, seq, kv_heads, d_value)
    bias = make_normal(seed + 3, heads, n_buckets) if n_buckets else None
    starts = np.random.default_rng(seed).random((batch, seq)) < 0.3
    segments = np.cumsum(starts, axis=1).astype(np.int32) if has_segments else None
    cotangents = (
        make_normal(seed + 4, batch, seq, heads, d_value),
        make_normal(seed, batch, seq, heads),
    )
    return (q, k, v, bias), segments, window_len, cotangents


def loop_bucket(distance, n_buckets):
    """The bucket of a distance, from the description in Raffel et al. (2020)."""
    exact = n_buckets // 2
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(DistanceBias().max_distance / exact)
    return min(exact + int(share * (n_buckets - exact)), n_buckets - 1)


def loop_attention(arrays, segments, window_len):
    """Softmax attention by definition, in numpy: returns out and log-normaliser."""
    q, k, v, bias = arrays
    batch, seq, heads, d_key = q.shape
    out = np.zeros((batch, seq, heads, v.shape[-1]))
    log_normalizer = np.zeros((batch, seq, heads))
    for b, t, h in np.ndindex(batch, seq, heads):
        kv_head = h // (heads // k.shape[2])
        scores, values = [], []
        for s in range(t + 1):
            if window_len and t - s >= window_len:
                continue
            if segments is not None and segments[b, t] != segments[b, s]:
                continue
            score = q[b, t, h] @ k[b, s, kv_head] / math.sqrt(d_key)
            if bias is not None:
                score += bias[h, loop_bucket(t - s, bias.shape[1])]
            scores.append(score)
            values.append(v[b, s, kv_head])
        log_normalizer[b, t, h] = np.logaddexp.reduce(scores)
        out[b, t, h] = np.exp(np.array(scores) - log_normalizer[b, t, h]) @ np.array(values)
    return out, log_normalizer


def make_function(form, segments, window_len):
    """Returns (query, key, value, bias) -> (out, log-normaliser) of self-attention."""

    def function(q, k, v, bias):
        positions = jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        ids = None if segments is None else jnp.asarray(segments)
        return tuple(
            attention_partial(
                q,
                k,
                v,
                Keys(positions, positions, ids, ids),
                is_aligned=True,
                window_len=window_len,
                relative_bias=None if bias is None else DistanceBias(bias),
                implementation=form,
            )
        )

    return function


def value_and_gradients(function, arrays, cotangents, dtype):
    """Returns function(*arrays) and the pulled-back cotangents, computed from `dtype` inputs."""

    @jax.jit
    def run(arrays, cotangents):
        out, pull = jax.vjp(function, *arrays)
        cotangents = jax.tree.map(lambda c, o: c.astype(o.dtype), cotangents, out)
        return out, pull(cotangents)

    cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
    return run(cast(arrays), jax.tree.map(jnp.asarray, cotangents))


@functools.cache
@in_float64
def expected_of(shape, rounding="float64"):
    """Returns value and gradients of the dense form in float64, on inputs rounded to `rounding`."""
    arrays, segments, window_len, cotangents = make_inputs(shape)
    arrays = jax.tree.map(lambda x: jnp.asarray(x, rounding), arrays)
    function = make_function("dense", segments, window_len)
    return jax.tree.map(np.asarray, value_and_gradients(function, arrays, cotangents, "float64"))


@pytest.mark.parametrize("shape", SHAPES)
@in_float64
def test_dense_is_the_definition(shape):
    arrays, segments, window_len, _ = make_inputs(shape)
    expected = loop_attention(arrays, segments, window_len)
    function = jax.jit(make_function("dense", segments, window_len))
    actual = function(*jax.tree.map(jnp.asarray, arrays))
    assert_trees_close(actual, expected, rel_rms=1e-12)


@in_float64
def test_gradient_of_dense_is_the_derivative():
    arrays, segments, window_len, _ = make_inputs("window")
    function = jax.jit(make_function("dense", segments, window_len))
    check_grads(function, jax.tree.map(jnp.asarray, arrays), order=1, modes=["rev"], rtol=1e-5)


@pytest.mark.parametrize(("form", "shape"), CASES)
def test_values_and_gradients(form, shape):
    arrays, segments, window_len, cotangents = make_inputs(shape)
    function = make_function(form, segments, window_len)
    actual = value_and_gradients(function, arrays, cotangents, "float32")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(actual))
    assert_trees_close(actual[0], expected_of(shape)[0], rel_rms=TOLERANCE)
    # With one visible key the gradients of query and key are rounding errors around zero.
    is_free = not (shape == "one_token" or window_len == 1)
    skipped = 0 if is_free else 2
    assert_trees_close(actual[1][skipped:], expected_of(shape)[1][skipped:], rel_rms=5 * TOLERANCE)


@pytest.mark.parametrize("form", [pytest.param("banded", marks=pytest.mark.slow), "blockwise"])
def test_bfloat16_inputs(form):
    arrays, segments, window_len, cotangents = make_inputs("window")
    function = make_function(form, segments, window_len)
    (out, log_normalizer), gradients = value_and_gradients(function, arrays, cotangents, "bfloat16")
    assert out.dtype == jnp.bfloat16 and log_normalizer.dtype == jnp.float32
    expected, expected_gradients = expected_of("window", "bfloat16")
    assert_close(out, expected[0], rel_rms=BFLOAT16_TOLERANCE["out"])
    assert_close(log_normalizer, expected[1], rel_rms=1e-6)
    assert_trees_close(gradients, expected_gradients, rel_rms=BFLOAT16_TOLERANCE["gradient"])


@pytest.mark.parametrize("form", ["banded", "auto"])
def test_front_door(form):
    arrays, segments, window_len, _ = make_inputs("window")
    q, k, v, bias = jax.tree.map(jnp.float32, arrays)
    bias = DistanceBias(bias)
    run = functools.partial(attention, window_len=window_len, relative_bias=bias)
    run = jax.jit(functools.partial(run, segment_ids=jnp.asarray(segments), implementation=form))
    assert_close(run(q, k, v), expected_of("window")[0][0], rel_rms=TOLERANCE)


def test_scale():
    arrays, _, window_len, _ = make_inputs("window")
    q, k, v = (jnp.float32(x) for x in arrays[:3])
    run = jax.jit(functools.partial(attention, window_len=window_len, scale=0.25))
    expected, _ = loop_attention((0.25 * 2 * arrays[0], *arrays[1:3], None), None, window_len)
    assert_close(run(q, k, v), expected, rel_rms=TOLERANCE)


def test_vmap_and_checkpoint_compose():
    arrays, _, _, _ = make_inputs("full")
    q, k, v = (jnp.stack([jnp.float32(x), 2 * jnp.float32(x)]) for x in arrays[:3])

    def loss(form):
        return lambda q, k, v: jnp.sum(attention(q, k, v, implementation=form)[..., 0] ** 2)

    actual = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss("blockwise")), argnums=(0, 1, 2))))
    each = jax.jit(jax.grad(loss("dense"), argnums=(0, 1, 2)))
    expected = jax.tree.map(lambda *x: jnp.stack(x), *[each(q[i], k[i], v[i]) for i in range(2)])
    assert_trees_close(actual(q, k, v), expected, rel_rms=5e-6)


@pytest.mark.parametrize("form", FORMS)
def test_huge_scores(form):
    shape = (1, 9, 2, 1)
    q, k, v = (make_normal(i, *shape[:2], shape[2], 4) for i in range(3))
    q, k = 100 * np.sign(q), 50 * np.sign(k)  # scores are multiples of 1e4 from -2e4 to 2e4
    function = make_function(form, None, 6)
    cotangents = make_normal(3, 1, 9, 2, 4), make_normal(4, 1, 9, 2)
    with jax.enable_x64(True):
        dense = make_function("dense", None, 6)
        expected = value_and_gradients(dense, (q, k, v, None), cotangents, "float64")
        expected = jax.tree.map(np.asarray, expected)
    actual = value_and_gradients(function, (q, k, v, None), cotangents, "float32")
    assert np.abs(expected[0][1]).max() >= 1e4
    assert_trees_close(actual, expected, rel_rms=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_equal_keys_average_the_values(form):
    q, v = jnp.float32(make_normal(0, 1, 7, 2, 4)), make_normal(1, 1, 7, 2, 4)
    function = jax.jit(make_function(form, None, 4))
    out, log_normalizer = function(q, jnp.zeros_like(q), jnp.float32(v), None)
    expected = np.stack([v[:, max(0, t - 3) : t + 1].mean(axis=1) for t in range(7)], axis=1)
    assert_close(out, expected, rel_rms=TOLERANCE)
    counts = np.log(np.minimum(np.arange(7) + 1, 4))
    assert_close(log_normalizer[0, :, 0], counts, rel_rms=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_keys(form):
    q, k, v = (make_normal(i, 2, 6, 2, 4) for i in range(3))
    positions = jnp.array([[-1, -1, 0, 1, 2, 3], [-1, -1, -1, -1, -1, -1]], jnp.int32)

    def function(q, k, v):
        where = Keys(positions, positions)
        return tuple(
            attention_partial(q, k, v, where, is_aligned=True, window_len=3, implementation=form)
        )

    cotangents = make_normal(3, 2, 6, 2, 4), make_normal(4, 2, 6, 2)
    (out, log_normalizer), gradients = value_and_gradients(
        function, (q, k, v), cotangents, "float32"
    )
    empty = np.asarray(positions) < 0
    assert np.all(np.asarray(out)[empty] == 0)
    assert np.all(np.asarray(log_normalizer)[empty] == -np.inf)
    expected = loop_attention((q[:1, 2:], k[:1, 2:], v[:1, 2:], None), None, 3)
    assert_close(out[:1, 2:], expected[0], rel_rms=TOLERANCE)
    assert_close(log_normalizer[:1, 2:], expected[1], rel_rms=TOLERANCE)
    for gradient in gradients:
        assert np.isfinite(gradient).all() and np.all(np.asarray(gradient)[empty] == 0)


# --- merging partial results -------------------------------------------------------------------


@functools.cache
def masked_partial():
    """Returns jitted (owner [keys], part) -> partial over the keys that `part` owns."""
    q, k, v = (jnp.float32(make_normal(i, 2, 7, 2, 4)) for i in range(3))
    positions = jnp.arange(7, dtype=jnp.int32)[None]

    @jax.jit
    def partial(owner, part):
        where = Keys(positions, jnp.where(owner == part, positions, ops.NEVER))
        return attention_partial(q, k, v, where, implementation="dense")

    return partial


merge = jax.jit(ops.merge_partial_attention)


@given(st.lists(st.integers(0, 2), min_size=7, max_size=7))
@settings(deadline=None, max_examples=30)
def test_any_split_of_the_keys_merges_to_the_whole(owner):
    owner = jnp.array(owner)
    parts = [masked_partial()(owner, part) for part in range(3)]
    whole = masked_partial()(jnp.zeros(7, jnp.int32), 0)
    left = merge(merge(parts[0], parts[1]), parts[2])
    right = merge(parts[0], merge(parts[1], parts[2]))
    for merged in (left, right, merge(merge(parts[2], parts[0]), parts[1])):
        assert_trees_close(tuple(merged), tuple(whole), rel_rms=3e-7)


def test_sliced_keys_merge_to_the_whole():
    q, k, v = (jnp.float32(make_normal(i, 1, 7, 2, 4)) for i in range(3))
    positions = jnp.arange(7, dtype=jnp.int32)[None]

    def part(q, k, v, *index):
        index = slice(*index)
        where = Keys(positions, positions[:, index])
        return attention_partial(q, k[:, index], v[:, index], where, implementation="dense")

    part = jax.jit(part, static_argnums=(3, 4))
    merged = merge(part(q, k, v, 0, 3), part(q, k, v, 3, 7))
    assert_trees_close(tuple(merged), tuple(part(q, k, v, 0, 7)), rel_rms=3e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_alone(dtype):
    shapes = ((2, 1, 6, 4), (2, 1, 2, 4), (2, 1, 2, 4))
    query, key, value = (jnp.asarray(make_normal(i, *s), dtype) for i, s in enumerate(shapes))
    table = jnp.asarray(make_normal(3, 6, 5), jnp.float32)
    options = {"relative_bias": DistanceBias(table), "scale": 0.3}
    places = jnp.full((1, 1), 7)
    expected = attention_partial(query, key, value, Keys(places, places), **options)
    found = ops.attention_to_self(query, key, value, **options)
    assert found.out.dtype == dtype
    assert_trees_close(found, expected, rel_rms=1e-6)


def test_empty_partial_is_neutral():
    partial = masked_partial()(jnp.array([1, 1, 0, 0, 0, 0, 0]), 0)  # two rows without keys
    empty = ops.empty_partial(partial)
    for merged in (merge(partial, empty), merge(empty, partial)):
        assert np.array_equal(merged.out, partial.out)
        assert np.array_equal(merged.log_normalizer, partial.log_normalizer)
    nothing = merge(empty, empty)
    assert np.all(nothing.out == 0) and np.all(nothing.log_normalizer == -np.inf)


def test_gradient_of_a_merge_is_finite():
    partial = masked_partial()(jnp.array([1, 1, 0, 0, 0, 0, 0]), 0)

    @jax.jit
    @jax.grad
    def gradient(left):
        merged = ops.merge_partial_attention(left, ops.empty_partial(left))
        log_normalizer = merged.log_normalizer
        finite = jnp.where(jnp.isfinite(log_normalizer), log_normalizer, 0.0)
        return jnp.sum(merged.out**2) + jnp.sum(finite)

    gradients = gradient(partial)
    assert_close(gradients.out, 2 * partial.out, rel_rms=1e-6)
    expected = np.isfinite(partial.log_normalizer).astype(float)
    assert_close(gradients.log_normalizer, expected, rel_rms=1e-6)


def test_merge_of_unequal_shapes():
    left = Partial(jnp.zeros((1, 2, 1, 3)), jnp.zeros((1, 2, 1)))
    right = Partial(jnp.zeros((1, 3, 1, 3)), jnp.zeros((1, 3, 1)))
    with pytest.raises(ValueError, match=r"equal shapes: got \(1, 2, 1, 3\) and \(1, 3, 1, 3\)"):
        ops.merge_partial_attention(left, right)


# --- choosing a form ---------------------------------------------------------------------------

GPU = select._Facts(
    "gpu", "bfloat16", 1, 2, 2, 512, 512, 64, 64, 0, True, False, False, needs_normalizer=False
)
CHOICES = [
    ("cudnn", {}),
    ("cudnn", {"window_len": 128}),
    ("dense", {"platform": "cpu"}),
    ("dense", {"dtype": "float32"}),
    ("dense", {"is_aligned": False}),
    ("dense", {"has_segments": True}),
    ("dense", {"has_bias": True}),
    ("dense", {"needs_normalizer": True}),
    ("dense", {"d_value": 128}),
    ("dense", {"d_key": 60, "d_value": 60}),
    ("dense", {"d_key": 512, "d_value": 512}),
    ("dense", {"platform": "cpu", "query_len": 704, "key_len": 704}),
    ("blockwise", {"platform": "cpu", "query_len": 704, "key_len": 705}),
    ("dense", {"platform": "cpu", "query_len": 128, "key_len": 9999}),  # few queries
    ("blockwise", {"platform": "cpu", "query_len": 129, "key_len": 9999}),
    ("blockwise", {"platform": "cpu", "query_len": 33, "key_len": 9999, "heads": 8}),
    ("banded", {"platform": "cpu", "window_len": 128, "query_len": 257}),
    ("dense", {"platform": "cpu", "window_len": 128, "query_len": 256}),
    ("dense", {"platform": "cpu", "window_len": 128, "query_len": 257, "is_aligned": False}),
]


@pytest.mark.parametrize(("expected", "changes"), CHOICES, ids=str)
def test_the_automatic_choice(expected, changes, monkeypatch):
    monkeypatch.undo()  # the true block lengths
    facts = GPU.__class__(**{**GPU.__dict__, **changes})
    for _ in range(2):
        assert dispatch.choose("attention", select.IMPLEMENTATIONS, "auto", facts).name == expected


def test_the_choice_is_said_once(monkeypatch):
    lines = []
    monkeypatch.setattr(dispatch, "_ALREADY_SAID", set())
    monkeypatch.setattr(dispatch.logging, "info", lambda line, *args: lines.append(line % args))
    for facts in (GPU, GPU, GPU.__class__(**{**GPU.__dict__, "window_len": 8, "dtype": "float32"})):
        dispatch.choose("attention", select.IMPLEMENTATIONS, "auto", facts)
    assert len(lines) == 2
    assert "op=attention implementation=cudnn" in lines[0]
    assert "implementation=banded" in lines[1] and "cudnn: it takes bfloat16" in lines[1]


def call(**options):
    x = jnp.zeros((1, 5, 2, 4))
    return attention(x, x, x, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"implementation": "cudnn"}, "'cudnn' cannot run here: it needs a GPU, this is cpu"),
        ({"implementation": "banded"}, "'banded' cannot run here: it needs window_len > 0"),
    ],
    ids=["cudnn", "banded"],
)
def test_a_named_form_that_cannot_run_raises(options, reason):
    if "GPU" in reason and dispatch.platform() != "cpu":
        pytest.skip("this machine has one")
    with pytest.raises(NotImplementedError, match=reason):
        call(**options)


def test_banded_needs_aligned_keys():
    x, positions = jnp.zeros((1, 5, 2, 4)), jnp.arange(5, dtype=jnp.int32)[None]
    with pytest.raises(NotImplementedError, match="consecutive tokens"):
        attention_partial(
            x, x, x, Keys(positions, positions), window_len=3, implementation="banded"
        )


def test_unknown_form():
    with pytest.raises(ValueError, match=r"one of \['auto', 'cudnn', .*: got 'flash'"):
        call(implementation="flash")


def test_heads_must_be_a_multiple():
    x = jnp.zeros((1, 5, 3, 4))
    with pytest.raises(ValueError, match="got 3 and 2; set config.model.n_kv_heads"):
        attention(x, x[:, :, :2], x[:, :, :2])


MEMORY_OF_FORMS = """
import jax, jax.numpy as jnp
from longctx_jax.ops.attention import attention

def temporaries(shape, implementation):
    x = jax.ShapeDtypeStruct((*shape, 64), jnp.float32)
    def loss(q, k, v):
        return jnp.sum(attention(q, k, v, implementation=implementation) ** 2)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return gradient.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

for shape in [(8, 2048, 8), (8, 704, 4), (8, 640, 8), (1, 1024, 8), (16, 512, 2), (32, 100, 8)]:
    auto, blocks = (temporaries(shape, name) for name in ("auto", "blockwise"))
    assert auto <= 1.2 * blocks, (shape, auto, blocks)
"""


@pytest.mark.slow
def test_auto_takes_no_more_memory_than_blocks():
    """Of the forward and backward passes as users compile them, whatever batch and heads are."""
    environment = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_FORMS],
        env=environment,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-1000:]
