"""Inputs at which published methods for decaying linear attention break, and ours at the same ones.

The published formulas are written out here as their code has them (docs/decay.md, "Numerical
safety"). The case below has what each of them stumbles over: signed numbers, a head that forgets at
once beside one that never does, one token more than whole chunks, fewer heads than a GPU has
multiprocessors, a value width that is no multiple of 32.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops.decay import decay_attention, pallas_triton
from longctx_jax.ops.decay.select import IMPLEMENTATIONS
from tests.helpers import assert_close, make_normal

FORMS = [i.name for i in IMPLEMENTATIONS if not i.name.startswith("pallas")]
LOG_DECAYS = np.array([-8.0, -0.7, 0.0])
SHAPE = (1, 513, 3, 16)  # batch, seq, heads, key
D_VALUE = 48
LONG = (1, 2048, 2, 8)
SLOW_DECAY = math.log(0.996)  # a token takes less than half a bfloat16 step off the state


def make_inputs(shape=SHAPE, d_value=D_VALUE, dtype="float32"):
    """Returns query, key and value, standard normal."""
    widths = (shape[3], shape[3], d_value)
    return [jnp.asarray(make_normal(i, *shape[:3], w), dtype) for i, w in enumerate(widths)]


def recurrence(query, key, value, log_decays):
    """Returns the output, token by token in float64, with scale 1, and the last state."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    keep = np.exp(log_decays)[:, None, None]
    out, state = np.zeros(value.shape), 0.0
    for t in range(query.shape[1]):
        state = keep * state + key[:, t, :, :, None] * value[:, t, :, None, :]
        out[:, t] = np.einsum("bhk,bhkv->bhv", query[:, t], state)
    return out, state


def assert_heads_close(actual, expected, *, rel_rms, axis):
    """Head by head: outputs of one that never forgets are much larger than the others'."""
    for head in range(expected.shape[axis]):
        parts = (np.take(np.asarray(x, np.float64), head, axis) for x in (actual, expected))
        assert_close(*parts, rel_rms=rel_rms)


def factored(query, key, value, decay):
    """lambda^i (Q (lambda^-j K)^T) V below the diagonal: one head, [seq, width]."""
    time = jnp.arange(len(query), dtype=jnp.float32)
    scores = jnp.tril(query @ (key * (decay**-time)[:, None]).T)
    return (decay**time)[:, None] * (scores @ value)


def test_factored_powers_leave_the_range():
    powers = jnp.float32(0.5) ** -jnp.float32([127, 128])
    assert np.isfinite(powers[0]) and np.isinf(powers[1])  # j log2(1 / lambda) > 127
    arrays = make_inputs(d_value=16)
    expected, _ = recurrence(*arrays, np.log([0.5] * 3))
    actual = jax.jit(factored)(*(x[0, :, 0] for x in arrays), 0.5)
    assert_close(actual[:120], expected[0, :120, 0], rel_rms=1e-5)  # right, as far as it goes
    assert not np.isfinite(actual[128:]).any()


def decayed_sum_by_logs(x, log_decay):
    """y_t = lambda y_{t-1} + x_t as exp(p + logcumsumexp(log x - p)), p_t = (t + 1) log lambda."""
    power = log_decay * jnp.arange(1, len(x) + 1, dtype=jnp.float32)
    return jnp.exp(power + jax.lax.cumlogsumexp(jnp.log(x) - power))


def test_logarithms_of_signed_numbers():
    signed = make_normal(0, 512)
    by_logs = jax.jit(decayed_sum_by_logs)
    expected = [0.0]
    for x in np.abs(signed):
        expected.append(math.exp(-0.7) * expected[-1] + x)
    assert_close(by_logs(jnp.float32(abs(signed)), -0.7), expected[1:], rel_rms=1e-4)  # seen: 1e-5
    first_negative = np.argmax(signed < 0)
    assert np.isnan(by_logs(jnp.float32(signed), -0.7)[first_negative:]).all()


def test_differences_of_infinite_sums():
    """A document border as a log decay of -inf: every later difference is inf - inf."""
    sums = jnp.cumsum(jnp.float32([-0.1, -jnp.inf, -0.1, -0.1]))
    assert np.isnan(jnp.exp(sums[3] - sums[2]))  # should be exp(-0.1)


def all_in_bfloat16(query, key, value, decay):
    """The token recurrence with a state in the dtype of its inputs."""

    def advance(state, token):
        q, k, v = token
        state = decay * state + k[..., None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (query, key, value))
    start = jnp.zeros((*key[:, 0].shape, value.shape[-1]), query.dtype)
    return jnp.moveaxis(jax.lax.scan(advance, start, tokens)[1], 0, 1)


@pytest.mark.parametrize(("sign", "form"), [("signed", "chunked"), ("positive", "recurrent")])
def test_a_bfloat16_state_stagnates(sign, form):
    arrays = make_inputs(LONG, 8, "bfloat16")
    arrays = [abs(x) for x in arrays] if sign == "positive" else arrays
    log_decays = np.full(2, SLOW_DECAY)
    expected, _ = recurrence(*arrays, log_decays)
    theirs = jax.jit(all_in_bfloat16)(*arrays, jnp.bfloat16(math.exp(SLOW_DECAY)))
    error = np.asarray(theirs, np.float64) - expected
    ratio = np.sqrt(np.mean(error**2) / np.mean(expected**2))
    assert ratio > 0.1  # seen: 0.2

    run = functools.partial(decay_attention, scale=1.0, implementation=form)
    out, state = jax.jit(run)(*arrays, jnp.float32(log_decays))
    assert state.dtype == jnp.float32
    assert_close(out, expected, rel_rms=5e-3)  # seen: 3e-3


@pytest.mark.parametrize("form", FORMS)
def test_every_form_stays_exact(form):
    arrays = make_inputs()
    expected = recurrence(*arrays, LOG_DECAYS)
    run = functools.partial(decay_attention, scale=1.0, implementation=form)
    out, state = jax.jit(run)(*arrays, jnp.float32(LOG_DECAYS))
    assert_heads_close(out, expected[0], rel_rms=1e-5, axis=2)  # seen: 4e-7
    assert_heads_close(state, expected[1], rel_rms=1e-5, axis=1)


def test_the_triton_kernel_stays_exact():
    arrays = make_inputs(d_value=16)
    expected = recurrence(*arrays, LOG_DECAYS)
    run = functools.partial(pallas_triton.decay_attention_pallas_triton, scale=1.0, interpret=True)
    out, state = jax.jit(run)(*arrays, jnp.float32(LOG_DECAYS))
    assert_heads_close(out, expected[0], rel_rms=1e-5, axis=2)
    assert_heads_close(state, expected[1], rel_rms=1e-5, axis=1)
