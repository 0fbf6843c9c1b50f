"""The selective scan and state-space duality against the recurrence, one token after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops.ssm import selective_scan, ssd
from tests.helpers import assert_trees_close, in_float64, make_normal

BATCH = 2
SCAN_FORMS = ("recurrent", "serial", "chunked")
SSD_FORMS = ("recurrent", "two_pass", "chunked")
FLOAT64, FLOAT64_GRADIENT = 1e-14, 1e-13  # seen: 3e-16, 4e-15
FLOAT32, FLOAT32_GRADIENT = 5e-7, 7e-6  # seen: 1e-7, 2.2e-6 (ssd, chunked)


def floats(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def resets(seq):
    """Returns document starts, among them the very first token of row 0."""
    starts = np.zeros((BATCH, seq), bool)
    starts[0, [0, seq // 2]] = True
    starts[1, [seq // 3, seq - 1]] = True
    return jnp.asarray(starts)


# --- the recurrence ----------------------------------------------------------------------------


def scan_definition(u, delta, a, b, c, d, h, reset):
    ys = []
    for t in range(u.shape[1]):
        if reset is not None:
            h = jnp.where(reset[:, t, None, None], 0, h)
        entering = (delta[:, t] * u[:, t])[..., None] * b[:, t, None]
        h = jnp.exp(delta[:, t, :, None] * a) * h + entering
        ys.append(jnp.einsum("bdn,bn->bd", h, c[:, t]) + d * u[:, t])
    return jnp.stack(ys, axis=1), h


def ssd_definition(u, delta, a, b, c, d, h, reset):
    heads = u.shape[2]
    b, c = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (b, c))
    ys = []
    for t in range(u.shape[1]):
        if reset is not None:
            h = jnp.where(reset[:, t, None, None, None], 0, h)
        entering = b[:, t, :, :, None] * (delta[:, t, :, None] * u[:, t])[:, :, None]
        h = jnp.exp(delta[:, t] * a)[..., None, None] * h + entering
        ys.append(jnp.einsum("bhn,bhnp->bhp", c[:, t], h) + d[:, None] * u[:, t])
    return jnp.stack(ys, axis=1), h


# --- inputs and calls --------------------------------------------------------------------------


def steps(*shape):
    return np.logaddexp(0.0, make_normal(1, *shape))


def scan_inputs(seq, model=3, state=4):
    return (
        make_normal(0, BATCH, seq, model),
        steps(BATCH, seq, model),
        -np.exp(make_normal(2, model, state)),
        make_normal(3, BATCH, seq, state),
        make_normal(4, BATCH, seq, state),
        make_normal(5, model),
        make_normal(6, BATCH, model, state),
    )


def ssd_inputs(seq, heads=4, groups=2, state=5, value=3):
    return (
        make_normal(0, BATCH, seq, heads, value),
        steps(BATCH, seq, heads),
        -np.exp(make_normal(2, heads)),
        make_normal(3, BATCH, seq, groups, state),
        make_normal(4, BATCH, seq, groups, state),
        make_normal(5, heads),
        make_normal(6, BATCH, heads, state, value),
    )


DEFINITIONS = {selective_scan: scan_definition, ssd: ssd_definition}
INPUTS = {selective_scan: scan_inputs, ssd: ssd_inputs}
BOTH = [*((selective_scan, f) for f in SCAN_FORMS), *((ssd, f) for f in SSD_FORMS)]
NAMES = [f"{op.__name__}-{form}" for op, form in BOTH]
MAIN = [(selective_scan, "chunked"), (selective_scan, "serial")]
each_form = pytest.mark.parametrize(("op", "form"), BOTH, ids=NAMES)
mostly_slow = pytest.mark.parametrize(
    ("op", "form"),
    [
        pytest.param(*pair, id=name, marks=() if pair in MAIN else pytest.mark.slow)
        for pair, name in zip(BOTH, NAMES, strict=True)
    ],
)


def run(op, form, inputs, reset=None):
    return op(*inputs, reset=reset, implementation=form, chunk_len=4)


def with_gradients(function, inputs, reset):
    """Returns the result of function(inputs, reset) and the gradients of a loss on all of it."""

    @jax.jit
    def both(inputs):
        def loss(inputs):
            result = function(inputs, reset)
            return sum(jnp.sum(jnp.sin(x)) for x in result), result

        return jax.grad(loss, has_aux=True)(inputs)

    gradients, result = both(jax.tree.map(jnp.asarray, inputs))
    return result, gradients


@functools.cache
@in_float64
def expected(op, seq, has_resets):
    reset = resets(seq) if has_resets else None
    inputs, definition = INPUTS[op](seq), DEFINITIONS[op]
    call = with_gradients(lambda inputs, reset: definition(*inputs, reset), inputs, reset)
    return jax.tree.map(np.asarray, call)


CASES = [  # with chunks of 4: one token, chunk - 1, chunk, chunk + 1, several
    pytest.param(
        *(op, form, seq, has_resets),
        id=f"{op.__name__}-{form}-{seq}-{'resets' if has_resets else 'one_document'}",
        marks=() if seq == 6 and has_resets and (op, form) in MAIN else pytest.mark.slow,
    )
    for op, form in BOTH
    for seq in (1, 3, 4, 5, 6, 11)
    for has_resets in (True, False)
]


@pytest.mark.parametrize(("op", "form", "seq", "has_resets"), CASES)
@in_float64
def test_equals_the_recurrence_in_float64(op, form, seq, has_resets):
    reset = resets(seq) if has_resets else None
    result, gradients = with_gradients(functools.partial(run, op, form), INPUTS[op](seq), reset)
    assert_trees_close(result, expected(op, seq, has_resets)[0], rel_rms=FLOAT64)
    assert_trees_close(gradients, expected(op, seq, has_resets)[1], rel_rms=FLOAT64_GRADIENT)


@each_form
@pytest.mark.slow
def test_equals_the_recurrence_in_float32(op, form):
    inputs = floats(INPUTS[op](11))
    function = functools.partial(run, op, form)
    result, gradients = with_gradients(function, inputs, resets(11))
    assert all(x.dtype == jnp.float32 for x in result)
    assert_trees_close(result, expected(op, 11, True)[0], rel_rms=FLOAT32)
    assert_trees_close(gradients, expected(op, 11, True)[1], rel_rms=FLOAT32_GRADIENT)


@mostly_slow
@pytest.mark.parametrize("cut", [1, pytest.param(5, marks=pytest.mark.slow)])
@in_float64
def test_two_calls_are_one(op, form, cut):
    *tokens, state = jax.tree.map(jnp.asarray, INPUTS[op](6))
    reset, call = resets(6), jax.jit(functools.partial(op, implementation=form, chunk_len=4))

    def part(piece, state):
        pieces = [x[:, piece] if x.ndim > 2 else x for x in tokens]
        return call(*pieces, state, reset=reset[:, piece])

    first, state = part(slice(0, cut), state)
    rest, state = part(slice(cut, None), state)
    result = jnp.concatenate([first, rest], axis=1), state
    assert_trees_close(result, expected(op, 6, True)[0], rel_rms=FLOAT64)


@pytest.mark.slow
@each_form
def test_bfloat16_inputs_keep_a_float32_state(op, form):
    u, delta, a, b, c, d, state = floats(INPUTS[op](6))
    u, b, c = (jnp.asarray(x, jnp.bfloat16) for x in (u, b, c))
    call = jax.jit(functools.partial(run, op, form))
    y, last = call((u, delta, a, b, c, d, state), resets(6))
    assert y.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    rounded = (jnp.float32(x) for x in (u, delta, a, b, c, d, state))
    exact = jax.jit(DEFINITIONS[op])(*rounded, resets(6))
    assert_trees_close((y, last), exact, rel_rms=5e-3)  # seen: 4e-3


@pytest.mark.slow
@pytest.mark.parametrize("form", SCAN_FORMS)
def test_extreme_steps(form):
    """Steps that forget all, and steps that change nothing."""
    u, delta, a, b, c, d, state = floats(scan_inputs(11))
    delta = np.random.default_rng(0).choice([0.0, 1e-6, 1.0, 50.0, 1e4], delta.shape)
    inputs = (u, floats(delta), a, b, c, d, state)
    result, gradients = with_gradients(functools.partial(run, selective_scan, form), inputs, None)
    with jax.enable_x64(True):
        exact = jax.jit(scan_definition)(*(jnp.float64(x) for x in inputs), None)
    assert_trees_close(result, exact, rel_rms=FLOAT32)  # seen: 5e-8
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.slow
@pytest.mark.parametrize("form", SCAN_FORMS)
def test_jit_vmap_and_grad_compose(form):
    inputs = [floats(np.stack([x, 2 * x, x / 2])) for x in scan_inputs(5)]
    reset = resets(5)

    def loss(*inputs):
        return jnp.sum(jnp.sin(run(selective_scan, form, inputs, reset)[0]))

    gradient = jax.grad(loss, argnums=tuple(range(7)))
    together, alone = jax.jit(jax.vmap(gradient))(*inputs), jax.jit(gradient)
    for i in range(3):
        one = alone(*(x[i] for x in inputs))
        assert_trees_close(tuple(x[i] for x in together), one, rel_rms=1e-6)


@pytest.mark.parametrize("form", SCAN_FORMS)
def test_the_backward_pass_keeps_no_state_a_token(form):
    """What crosses from the forward to the backward pass, at 64 tokens of 3 x 4 numbers."""
    seq, n_numbers = 64, 3 * 4
    inputs = floats(scan_inputs(seq))

    def call(*inputs):
        return selective_scan(*inputs, implementation=form, chunk_len=16)[0]

    _, backward = jax.vjp(call, *inputs)
    kept = max(leaf.size for leaf in jax.tree.leaves(backward))
    if form == "recurrent":
        assert kept == BATCH * seq * n_numbers
    else:
        assert kept <= BATCH * seq * 4  # the largest input; states are kept once a chunk


def test_optional_arguments():
    u, delta, a, b, c, d, state = floats(scan_inputs(5))
    whole = selective_scan(u, delta, a, b, c, d, jnp.zeros_like(state))
    assert_trees_close(selective_scan(u, delta, a, b, c, d), whole, rel_rms=0.0)
    y, _ = selective_scan(u, delta, a, b, c)
    assert_trees_close(y + d * u, whole[0], rel_rms=1e-6)


def test_mistakes():
    inputs = floats(scan_inputs(3))
    with pytest.raises(ValueError, match="'serial', 'chunked', 'recurrent'.*: got 'fast'"):
        selective_scan(*inputs, implementation="fast")
    with pytest.raises(ValueError, match="chunk_len must be at least 1: got 0"):
        selective_scan(*inputs, chunk_len=0)
    with pytest.raises(ValueError, match="at least one row and one token"):
        selective_scan(*floats(scan_inputs(0)))
    with pytest.raises(ValueError, match="implementation must be one of .*: got 'fast'"):
        ssd(*floats(ssd_inputs(3)), implementation="fast")
    with pytest.raises(ValueError, match="must divide the largest"):
        ssd(*floats(ssd_inputs(3, groups=3)))
