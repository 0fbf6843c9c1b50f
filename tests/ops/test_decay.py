"""Every form of decay attention against a loop over tokens and its hand-written backward pass."""

import functools
import inspect
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx_jax.ops.checked import checked
from longctx_jax.ops.decay import decay_attention, decay_attention_step, explain, linear_vjp
from longctx_jax.ops.decay.facts import Facts
from longctx_jax.ops.decay.select import IMPLEMENTATIONS, explain_facts
from tests.helpers import assert_close, assert_trees_close, in_float64, make_normal

KERNELS = ("pallas_triton", "pallas_mosaic_gpu")  # test_decay_triton.py, test_decay_mosaic.py
FORMS = [i.name for i in IMPLEMENTATIONS if i.name not in KERNELS]
TOLERANCE = {"float32": 1e-6, "float64": 1e-12, "bfloat16": 5e-3}  # seen: 4e-7, 6e-16, 3e-3
GRADIENT_TOLERANCE = {"float32": 2e-6, "float64": 1e-11, "bfloat16": 1e-2}

# name -> batch, seq, d_key, d_value, chunk_len, initial state, resets at
SHAPES = {
    "one_token": (2, 1, 3, 2, 4, True, ()),
    "chunk_minus_1": (1, 3, 2, 3, 4, False, (1,)),
    "chunk": (2, 4, 4, 4, 4, True, ()),
    "chunk_plus_1": (1, 5, 4, 2, 4, True, (0, 4)),
    "chunks_of_1": (1, 5, 2, 2, 1, True, (2,)),
    "chunks_of_3": (2, 11, 3, 5, 3, True, (3, 4, 10)),
    "chunk_over_seq": (1, 7, 2, 3, 9, True, (0,)),
}
LOG_DECAYS = np.array([np.log(0.9), np.log(0.5), 0.0, -np.inf])
MAIN = ("two_pass", "chunked")  # one of each way to differentiate; the others are mostly slow
HAVE_CHUNKS = (*MAIN, "block", "prefix", "recursion")


def case(form, *rest, is_fast):
    """One test case; those that are not fast are slow only because each compiles a program."""
    name = "-".join(map(str, (form, *rest)))
    return pytest.param(form, *rest, id=name, marks=() if is_fast else pytest.mark.slow)


CASES = [
    case(form, shape, per_token, is_fast=is_fast)
    for form in FORMS
    for shape in SHAPES
    for per_token in ("constant", "per_token")
    for is_fast in [shape == "chunks_of_3" and (form in MAIN or per_token == "per_token")]
    if form in HAVE_CHUNKS or not shape.startswith("chunks_of_1")
]
MOSTLY_SLOW = [case(form, is_fast=form in MAIN) for form in FORMS]


def slow_but(kind):
    """Every form with both kinds of decay; fast for the main forms with the kind named."""
    kinds = ("constant", "per_token")
    return [case(f, k, is_fast=f in MAIN and k == kind) for f in FORMS for k in kinds]


def make_inputs(shape, log_decays=LOG_DECAYS, kind="constant"):
    """Returns float64 (query, key, value, log_decay, state), reset, chunk_len and cotangents.

    Per-token decays are log_decays (without -inf) times random factors, and -inf here and there.
    """
    batch, seq, d_key, d_value, chunk_len, has_state, resets = SHAPES[shape]
    heads, seed = len(log_decays), zlib.crc32(shape.encode())
    q = make_normal(seed, batch, seq, heads, d_key)
    k = make_normal(seed + 1, batch, seq, heads, d_key)
    v = make_normal(seed + 2, batch, seq, heads, d_value)
    state = make_normal(seed + 3, batch, heads, d_key, d_value) * has_state
    reset = np.zeros((batch, seq), bool)
    reset[-1, list(resets)] = True  # other rows run on
    cotangents = make_normal(seed + 4, *v.shape), make_normal(seed + 5, *state.shape)
    if kind == "per_token":
        factors = np.abs(make_normal(seed + 6, batch, seq, heads)) * 3
        log_decays = factors * np.maximum(log_decays, -20.0)
        log_decays[:, seq // 2, 1] = -np.inf
    return (q, k, v, log_decays, state), reset if resets else None, chunk_len, cotangents


def loop(arrays, reset, cotangents=None):
    """The token recurrence in numpy, and its backward pass: (out, state), gradients of arrays."""
    q, k, v, log_decay, state = (np.asarray(x, np.float64) for x in arrays)
    seq, scale = q.shape[1], q.shape[-1] ** -0.5
    keep = np.ones(q.shape[:2]) if reset is None else 1.0 - np.asarray(reset)
    keep = np.exp(log_decay) * keep[:, :, None] * np.ones(q.shape[:3])
    keep = keep[..., None, None]
    out, states = np.zeros(v.shape), [state]
    for t in range(seq):
        update = k[:, t, :, :, None] * v[:, t, :, None, :]
        states.append(keep[:, t] * states[-1] + update)
        out[:, t] = scale * np.einsum("bhk,bhkv->bhv", q[:, t], states[-1])
    if cotangents is None:
        return out, states[-1]
    d_out, d_state = cotangents
    d_q, d_k, d_v, d_log_decay = (np.zeros(x.shape) for x in (q, k, v, keep[..., 0, 0]))
    for t in reversed(range(seq)):
        d_q[:, t] = scale * np.einsum("bhv,bhkv->bhk", d_out[:, t], states[t + 1])
        d_state = d_state + scale * q[:, t, :, :, None] * d_out[:, t, :, None, :]
        d_k[:, t] = np.einsum("bhkv,bhv->bhk", d_state, v[:, t])
        d_v[:, t] = np.einsum("bhkv,bhk->bhv", d_state, k[:, t])
        d_log_decay[:, t] = np.sum(d_state * keep[:, t] * states[t], axis=(2, 3))
        d_state = keep[:, t] * d_state
    if log_decay.ndim == 1:
        d_log_decay = np.sum(d_log_decay, axis=(0, 1))
    return (out, states[-1]), (d_q, d_k, d_v, d_log_decay, d_state)


def value_and_gradients(form, arrays, reset, chunk_len, cotangents, dtype):
    def function(*arrays):
        return decay_attention(
            *arrays,
            reset=None if reset is None else jnp.asarray(reset),
            chunk_len=chunk_len,
            implementation=form,
        )

    @jax.jit
    def run(arrays, cotangents):
        out, pull = jax.vjp(function, *arrays)
        return out, pull(jax.tree.map(lambda c, o: c.astype(o.dtype), cotangents, out))

    arrays = tuple(jnp.asarray(x, dtype) for x in arrays[:3]) + tuple(
        jnp.asarray(x, jnp.promote_types(dtype, "float32")) for x in arrays[3:]
    )
    return run(arrays, jax.tree.map(jnp.asarray, cotangents))


@pytest.mark.parametrize(("form", "shape", "kind"), CASES)
def test_values_and_gradients(form, shape, kind):
    arrays, reset, chunk_len, cotangents = make_inputs(shape, kind=kind)
    expected = loop(arrays, reset, cotangents)
    actual = value_and_gradients(form, arrays, reset, chunk_len, cotangents, "float32")
    assert_trees_close(actual[0], expected[0], rel_rms=TOLERANCE["float32"])
    assert_trees_close(actual[1], expected[1], rel_rms=GRADIENT_TOLERANCE["float32"])


@pytest.mark.parametrize(("form", "kind"), slow_but("per_token"))
def test_float64(form, kind):
    arrays, reset, chunk_len, cotangents = make_inputs("chunks_of_3", kind=kind)
    expected = loop(arrays, reset, cotangents)
    with jax.enable_x64(True):
        actual = value_and_gradients(form, arrays, reset, chunk_len, cotangents, "float64")
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(actual))
    assert_trees_close(actual[0], expected[0], rel_rms=TOLERANCE["float64"])
    assert_trees_close(actual[1], expected[1], rel_rms=GRADIENT_TOLERANCE["float64"])


@pytest.mark.parametrize(("form", "kind"), slow_but("constant"))
def test_bfloat16(form, kind):
    arrays, reset, chunk_len, cotangents = make_inputs("chunks_of_3", kind=kind)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays[:3]]
    arrays = (*rounded, *arrays[3:])
    expected = loop(arrays, reset, cotangents)
    (out, state), gradients = value_and_gradients(
        form, arrays, reset, chunk_len, cotangents, "bfloat16"
    )
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert_close(out, expected[0][0], rel_rms=TOLERANCE["bfloat16"])
    assert_close(state, expected[0][1], rel_rms=TOLERANCE["bfloat16"])
    assert_trees_close(gradients, expected[1], rel_rms=GRADIENT_TOLERANCE["bfloat16"])


@pytest.mark.parametrize("form", MOSTLY_SLOW)
def test_strong_and_no_decay_over_a_long_sequence(form, monkeypatch):
    monkeypatch.setitem(SHAPES, "long", (1, 300, 2, 2, 64, True, (77,)))
    arrays, reset, chunk_len, cotangents = make_inputs("long", np.array([-8.0, 0.0, -np.inf]))
    expected = loop(arrays, reset, cotangents)
    actual = value_and_gradients(form, arrays, reset, chunk_len, cotangents, "float32")
    assert_trees_close(actual[0], expected[0], rel_rms=2e-6)
    assert_trees_close(actual[1], expected[1], rel_rms=5e-6)


@pytest.mark.parametrize("form", MOSTLY_SLOW)
def test_no_state_is_a_zero_state(form):
    (q, k, v, log_decay, state), _, _, _ = make_inputs("chunks_of_3")
    arrays = [jnp.float32(x) for x in (q, k, v, log_decay)]
    run = functools.partial(decay_attention, chunk_len=3, scale=0.5, implementation=form)
    actual = jax.jit(run)(*arrays)
    expected = loop((q, k, v, log_decay, 0 * state), None)
    scale = q.shape[-1] ** -0.5
    assert_close(actual[0], expected[0] * 0.5 / scale, rel_rms=TOLERANCE["float32"])
    assert_close(actual[1], expected[1], rel_rms=TOLERANCE["float32"])


@functools.cache
def jitted(form):
    run = functools.partial(decay_attention, chunk_len=3, implementation=form)
    return jax.jit(lambda arrays, reset: run(*arrays, reset=reset))


@pytest.mark.parametrize("form", MOSTLY_SLOW)
@given(st.lists(st.booleans(), min_size=14, max_size=14))
@settings(deadline=None, max_examples=25)
def test_resets_anywhere(form, resets):
    arrays, _, _, _ = make_inputs("chunk_over_seq")
    arrays = [np.concatenate([x, x[:, ::-1]]) for x in arrays[:3]] + [
        arrays[3],
        np.concatenate([arrays[4], arrays[4]]),
    ]
    reset = np.array(resets).reshape(2, 7)
    actual = jitted(form)(tuple(jnp.float32(x) for x in arrays), jnp.asarray(reset))
    assert_trees_close(actual, loop(arrays, reset), rel_rms=TOLERANCE["float32"])


@pytest.mark.parametrize("form", MOSTLY_SLOW)
@given(st.lists(st.sampled_from([1, 3, 8]), min_size=1, max_size=6))
@settings(deadline=None, max_examples=15)
def test_calls_chain(form, lengths):
    seq = sum(lengths)
    q, k, v = (make_normal(i, 1, 48, 4, 3)[:, :seq] for i in range(3))
    reset = np.random.default_rng(0).random((1, 48))[:, :seq] < 0.1
    state = make_normal(4, 1, 4, 3, 3)
    expected = loop((q, k, v, LOG_DECAYS, state), reset)
    outs, state, start = [], jnp.float32(state), 0
    for length in lengths:
        piece = slice(start, start + length)
        arrays = tuple(jnp.float32(x[:, piece]) for x in (q, k, v))
        arrays = (*arrays, jnp.float32(LOG_DECAYS), state)
        out, state = jitted(form)(arrays, jnp.asarray(reset[:, piece]))
        outs.append(out)
        start += length
    assert_close(np.concatenate(outs, axis=1), expected[0], rel_rms=TOLERANCE["float32"])
    assert_close(state, expected[1], rel_rms=TOLERANCE["float32"])


HEADS = {"grouped_query": (4, 2, 2, 4), "state_space": (1, 1, 4, 4), "two_decays": (4, 4, 4, 2)}


@pytest.mark.parametrize(
    ("heads", "kind"),
    [
        case(heads, kind, is_fast=heads == "state_space")
        for heads in HEADS
        for kind in ("constant", "per_token")
    ],
)
def test_heads_are_shared(heads, kind):
    (q, k, v, g, state), reset, _, cotangents = make_inputs("chunks_of_3", kind=kind)
    counts = dict(zip(("q", "k", "v", "g"), HEADS[heads], strict=True))
    q, k, v = q[:, :, : counts["q"]], k[:, :, : counts["k"]], v[:, :, : counts["v"]]
    g = g[..., : counts["g"]]

    def repeated(x, axis=2):
        return np.repeat(x, 4 // x.shape[axis], axis=axis)

    full = (repeated(q), repeated(k), repeated(v), repeated(g, -1), state)
    expected, gradients = loop(full, reset, cotangents)
    actual = value_and_gradients("chunked", (q, k, v, g, state), reset, 3, cotangents, "float32")
    assert_trees_close(actual[0], expected, rel_rms=TOLERANCE["float32"])

    def summed(gradient, n, axis):
        axis = axis % gradient.ndim
        shape = (*gradient.shape[:axis], n, -1, *gradient.shape[axis + 1 :])
        return gradient.reshape(shape).sum(axis + 1)

    axes = (2, 2, 2, -1)
    expected = [summed(d, n, a) for d, n, a in zip(gradients, counts.values(), axes, strict=False)]
    assert_trees_close(actual[1][:4], tuple(expected), rel_rms=GRADIENT_TOLERANCE["float32"])


def test_strong_decays_cost_the_next_ones_no_digits():
    """Sums of log decays in the thousands must not blur the small differences after them."""
    q, k, v = (make_normal(i, 1, 64, 1, 2) for i in range(3))
    g = np.full((1, 64, 1), -70.3)
    g[:, 40:] = -1e-3
    expected = loop((q, k, v, g, np.zeros((1, 1, 2, 2))), None)
    arrays = [jnp.float32(x) for x in (q, k, v, g)]
    actual = jax.jit(functools.partial(decay_attention, implementation="two_pass"))(*arrays)
    assert_close(actual[0][:, 40:], expected[0][:, 40:], rel_rms=TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("bfloat16", "constant"),
        pytest.param("float32", "constant", marks=pytest.mark.slow),
        pytest.param("bfloat16", "per_token", marks=pytest.mark.slow),
    ],
)
def test_decay_gradient_in_a_long_sequence(dtype, kind, monkeypatch):
    """The gradient of each head's own decay, in pieces: nothing may cancel over the sequence."""
    monkeypatch.setattr(linear_vjp, "PIECE_LEN", 512)
    arrays, _, _, cotangents = make_inputs_of((1, 1300, 8, 8), np.array([-0.03, -0.5, -8.0]), kind)
    arrays = (*(np.asarray(jnp.asarray(x, dtype), np.float64) for x in arrays[:3]), *arrays[3:])
    cotangents = (np.asarray(jnp.asarray(cotangents[0], dtype), np.float64), cotangents[1])
    expected = loop(arrays, None, cotangents)[1][3]
    actual = value_and_gradients("chunked", arrays, None, 64, cotangents, dtype)[1][3]
    for head in range(3):  # seen: 2e-3 in bfloat16, 1e-6 in float32
        tolerance = 1e-2 if dtype == "bfloat16" else 1e-5
        assert_close(actual[..., head], expected[..., head], rel_rms=tolerance)


@pytest.mark.parametrize("form", [case(f, is_fast=f in HAVE_CHUNKS) for f in FORMS])
def test_bfloat16_at_usual_sizes(form):
    """Sizes at which XLA takes other routes than at tiny ones (a CPU refuses some of them)."""
    q, k, v = (jnp.asarray(make_normal(i, 2, 256, 2, 16), jnp.bfloat16) for i in range(3))
    decay = jnp.float32([-0.1, -0.01])

    @jax.jit
    def run(q, k, v):
        out, _ = decay_attention(q, k, v, decay, implementation=form)
        return jnp.sum(out.astype(jnp.float32) ** 2), out

    (_, out), gradients = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(q, k, v)
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    expected = loop((*wide, np.asarray(decay), np.zeros((2, 2, 16, 16))), None)[0]
    assert_close(out, expected, rel_rms=TOLERANCE["bfloat16"])
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradients)


def make_inputs_of(shape, log_decays, kind="constant"):
    SHAPES["made"] = (*shape, 64, True, ())
    try:
        arrays, *rest = make_inputs("made", log_decays, kind)
        return (*arrays[:3], np.maximum(arrays[3], -60.0), arrays[4]), *rest
    finally:
        del SHAPES["made"]


def test_steps_equal_the_sequence():
    arrays, reset, _, _ = make_inputs("chunks_of_3")
    expected = loop(arrays, reset)
    q, k, v, log_decay, state = (jnp.float32(x) for x in arrays)
    step = jax.jit(decay_attention_step)
    for t in range(q.shape[1]):
        out, state = step(
            q[:, t], k[:, t], v[:, t], log_decay, state, reset=jnp.asarray(reset[:, t])
        )
        assert_close(out, expected[0][:, t], rel_rms=TOLERANCE["float32"])
    assert_close(state, expected[1], rel_rms=TOLERANCE["float32"])


@pytest.mark.parametrize("form", MOSTLY_SLOW)
def test_vmap_and_checkpoint_compose(form):
    arrays, _, _, _ = make_inputs("chunks_of_3", LOG_DECAYS[:3])
    arrays = tuple(np.stack([x, 0.5 * x]).astype(np.float32) for x in arrays)

    def loss(*arrays):
        out, state = decay_attention(*arrays, chunk_len=3, implementation=form)
        return jnp.sum(out**2) + jnp.sum(state)

    gradient = jax.grad(jax.checkpoint(loss), argnums=range(5))
    actual = jax.jit(jax.vmap(gradient))(*arrays)
    for i in range(2):  # one example after another
        inputs = [np.asarray(x[i], np.float64) for x in arrays]
        out, state = loop(inputs, None)
        by_hand = loop(inputs, None, (2 * out, np.ones(state.shape)))[1]
        assert_trees_close(tuple(np.asarray(g)[i] for g in actual), by_hand, rel_rms=5e-6)


@in_float64
def test_every_power_is_exact_at_a_large_distance():
    log_decay = np.array([-1e-4])
    q = np.zeros((1, 3000, 1, 1))
    q[0, -1] = 1.0
    run = jax.jit(functools.partial(decay_attention, chunk_len=64))
    out, _ = run(*(jnp.asarray(x) for x in (q, q[:, ::-1], np.ones(q.shape), log_decay)))
    assert_close(out[0, -1, 0, 0], np.exp(-1e-4 * 2999), rel_rms=1e-12)


def test_one_token_takes_the_recurrence():
    facts = Facts("cpu", "no such device", "bfloat16", 8, 1, 4, 64, 64)
    assert explain_facts(facts).chosen == "recurrent"


def test_explain_says_what_auto_takes_and_why():
    x = jax.ShapeDtypeStruct((2, 512, 4, 64), jnp.float32)
    explanation = explain(x, x, x, jax.ShapeDtypeStruct((4,), jnp.float32))
    text = str(explanation)
    assert f"-> {explanation.chosen}" in text
    assert {c.name for c in explanation.candidates} == {i.name for i in IMPLEMENTATIONS}
    assert "passed over: a GPU kernel, and jax runs on cpu" in text
    chosen, *others = (c.ms for c in explanation.candidates if c.ms is not None)
    assert chosen <= min(others)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 4, 4, 2), (1, 4, 3, 2), (1, 4, 4, 2), (4,)), "key has 3; repeat or regroup"),
        (((1, 4, 4, 2), (1, 4, 4, 2), (1, 5, 4, 2), (4,)), "time comes before heads"),
        (((1, 4, 4, 2), (1, 4, 4, 3), (1, 4, 4, 2), (4,)), "time comes before heads"),
        (((1, 4, 4, 2), (1, 4, 4, 2), (1, 4, 4, 2), (4, 4)), r"must be \[heads\] or"),
    ],
    ids=["heads", "seq", "widths", "decay"],
)
def test_shapes_that_contradict(shapes, message):
    with pytest.raises(ValueError, match=message):
        explain(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))


# Without the type checker of the tests, as users have it.
unchecked = checked(inspect.unwrap(decay_attention))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"state": (2, 1, 2, 2)}, r"state must be .* = \(2, 3, 2, 2\): got \(2, 1, 2, 2\)"),
        ({"state": (1, 3, 2, 2)}, r"got \(1, 3, 2, 2\)"),
        ({"reset": (2, 1)}, r"reset must be \[batch, seq\].*: got \(2, 1\)"),
    ],
    ids=["heads", "batch", "reset"],
)
def test_state_and_reset_must_fit(given, message):
    x = jnp.zeros((2, 4, 3, 2))
    given = {
        name: jnp.zeros(shape, bool if name == "reset" else float) for name, shape in given.items()
    }
    with pytest.raises((ValueError, TypeError), match=message):
        unchecked(x, x, x, jnp.zeros(3), **given)


def test_no_token_and_a_traced_scale_are_refused():
    x = jnp.zeros((1, 0, 2, 2))
    with pytest.raises(ValueError, match="at least one row and one token"):
        decay_attention(x, x, x, jnp.zeros(2))
    x = jnp.zeros((1, 2, 2, 2))
    with pytest.raises(TypeError, match="pass scale=1.0"):
        jax.jit(lambda s: unchecked(x, x, x, jnp.zeros(2), scale=s))(1.0)


@pytest.mark.parametrize("log_decay", [[0.9, 0.5], [-0.1, np.nan]], ids=["lambda", "nan"])
def test_a_decay_that_grows_is_refused(log_decay):
    x = jnp.zeros((1, 2, 2, 2))
    with pytest.raises(ValueError, match="log_decay must be <= 0, the log of what a token keeps"):
        decay_attention(x, x, x, jnp.asarray(log_decay))


@pytest.mark.parametrize("chunk_len", [0, -3])
def test_bad_chunk_len(chunk_len):
    x = jnp.zeros((1, 2, 1, 2))
    message = f"chunk_len must be at least 1: got {chunk_len}; set config.model.decay.chunk_len"
    with pytest.raises(ValueError, match=message):
        decay_attention(x, x, x, jnp.zeros(1), chunk_len=chunk_len)


def test_unknown_form():
    x = jnp.zeros((1, 2, 1, 2))
    with pytest.raises(ValueError, match="got 'parallel'"):
        decay_attention(x, x, x, jnp.zeros(1), implementation="parallel")
