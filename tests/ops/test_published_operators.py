"""The operators of decaying attention and of the associative memory against numpy transcriptions.

See tests/golden/README.md; whole models are in tests/models/test_published_equations.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops.decay import decay_attention
from longctx_jax.ops.memory import MemoryState, associative_read, associative_write, dpfp
from tests.golden.equations import armt, decay
from tests.golden.equations.common import StopGradient
from tests.golden.equations.differences import check_gradients
from tests.helpers import assert_close, in_float64, make_normal

FORMS = ["two_pass", "chunked", "block", "prefix", "quadratic", "recurrent"]
FORMS += ["causal_dot_product", "recursion", "fleet", "reference"]
BATCH, SEQ, HEADS, D_KEY, D_VALUE = 2, 14, 4, 3, 5
CONSTANT = np.array([0.0, 0.4, 0.97, 1.0])  # forgets all, ..., nothing


def token_decays(smallest=0.0):
    """Decays by token and head in [0, 1], some of them exactly 0 (or smallest) and 1."""
    gamma = np.random.default_rng(3).uniform(0.05, 1.0, (BATCH, SEQ, HEADS))
    gamma[0, 4, 0] = gamma[1, 9:11, 2] = smallest
    gamma[:, 2, 1] = gamma[0, :, 3] = 1.0
    return gamma


def make_inputs(kv_heads=HEADS):
    return {
        "q": make_normal(0, BATCH, SEQ, HEADS, D_KEY),
        "k": make_normal(1, BATCH, SEQ, kv_heads, D_KEY),
        "v": make_normal(2, BATCH, SEQ, kv_heads, D_VALUE),
        "state": make_normal(3, BATCH, HEADS, D_KEY, D_VALUE),
    }


def transcribe(q, k, v, gamma, state, scale, first=0, last=SEQ):
    """Returns (out, state) of the recurrence, row by row and head by head."""
    gamma = np.broadcast_to(gamma, (BATCH, SEQ, HEADS))
    out, after = np.empty((BATCH, last - first, HEADS, D_VALUE)), np.empty_like(state)
    here = slice(first, last)
    for b in range(BATCH):
        for h in range(HEADS):
            g = h * k.shape[2] // HEADS
            one = (q[b, here, h], k[b, here, g], v[b, here, g], gamma[b, here, h])
            out[b, :, h], after[b, h] = decay.recurrent(*one, scale, state[b, h])
    return out, after


@pytest.mark.parametrize("kind", ["constant", "token"])
def test_transcribed_forms_agree(kind):
    gamma = np.tile(CONSTANT, (BATCH, SEQ, 1)) if kind == "constant" else token_decays()
    q, k, v = (make_normal(i, SEQ, width) for i, width in enumerate((D_KEY, D_KEY, D_VALUE)))
    for h in range(HEADS):
        expected, _ = decay.recurrent(q, k, v, gamma[0, :, h], 0.7)
        for form in (decay.parallel, decay.recursion):
            assert_close(form(q, k, v, gamma[0, :, h], 0.7), expected, rel_rms=1e-14)


def op_cases():
    for form in FORMS:
        for kind in ("constant", "token"):
            is_fast = (form, kind) in (("two_pass", "token"), ("recursion", "constant"))
            marks = () if is_fast else pytest.mark.slow
            yield pytest.param(form, kind, id=f"{form}-{kind}", marks=marks)


@pytest.mark.parametrize(("form", "kind"), list(op_cases()))
@in_float64
def test_decay_attention_in_two_calls(form, kind):
    gamma = CONSTANT if kind == "constant" else token_decays()
    x = make_inputs(kv_heads=2)
    with np.errstate(divide="ignore"):
        log_gamma = np.log(gamma)

    @jax.jit
    def attend(q, k, v, log_gamma, state):
        options = {"scale": 0.7, "chunk_len": 4, "implementation": form}
        return decay_attention(q, k, v, log_gamma, state, **options)

    outs, state = [], x["state"]
    for first, last in [(0, SEQ // 2), (SEQ // 2, SEQ)]:
        here = slice(first, last)
        tokens = (x[name][:, here] for name in "qkv")
        out, state = attend(*tokens, log_gamma if kind == "constant" else log_gamma[:, here], state)
        outs.append(out)
    expected, after = transcribe(**x, gamma=gamma, scale=0.7)
    assert_close(np.concatenate(outs, axis=1), expected, rel_rms=1e-12)
    assert_close(state, after, rel_rms=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["constant", "token"])
@pytest.mark.parametrize("form", FORMS)
@in_float64
def test_decay_attention_gradients(form, kind):
    gamma = np.maximum(CONSTANT, 0.01) if kind == "constant" else token_decays(smallest=0.01)
    x = {**make_inputs(), "log_gamma": np.log(gamma)}
    weights = make_normal(7, BATCH, SEQ, HEADS, D_VALUE), make_normal(8, *x["state"].shape)

    def model_loss(x):
        out, state = decay_attention(
            x["q"],
            x["k"],
            x["v"],
            x["log_gamma"],
            x["state"],
            chunk_len=5,
            implementation=form,
        )
        return jnp.sum(weights[0] * out) + jnp.sum(weights[1] * state)

    def loss(x):
        gamma = np.exp(x["log_gamma"])
        tensors = {name: x[name] for name in ("q", "k", "v", "state")}
        out, state = transcribe(**tensors, gamma=gamma, scale=D_KEY**-0.5)
        return np.sum(weights[0] * out) + np.sum(weights[1] * state)

    check_gradients(loss, x, jax.jit(jax.grad(model_loss))(x), 1e-8)


WRITES = {
    "published": {},
    "no_correction": {"correction": False},
    "no_denominator": {"use_denominator": False},
    "eps": {"eps": 0.1},
}


@pytest.mark.parametrize("name", WRITES)
@in_float64
def test_associative_memory(name):
    """Two segments written and one read, as in the equations for one head."""
    o, nu, width, d_value, n_rows = {**WRITES[name]}, 3, 4, 5, 3
    keys, queries = make_normal(0, 2, n_rows, width), make_normal(1, 6, width)
    v = make_normal(2, 2, n_rows, d_value)
    beta = np.random.default_rng(4).uniform(0.1, 0.9, (2, n_rows))
    size = 2 * nu * width
    a, z = np.zeros((size, d_value)), np.zeros(size)
    state = MemoryState(jnp.ones((size, d_value)), jnp.ones(size))  # dropped where empty
    for s in range(2):
        f = np.array([armt.dpfp(u, nu) for u in keys[s]])
        assert_close(dpfp(jnp.asarray(keys[s]), nu), f, rel_rms=1e-15)
        a, z = armt.update(f, v[s], beta[s], a, z, s == 0, o, StopGradient())
        arrays = (jnp.asarray(f), jnp.asarray(v[s]), jnp.asarray(beta[s]))
        state, _ = associative_write(*arrays, state, is_empty=jnp.asarray(s == 0), **o)
        assert_close(state.matrix, a, rel_rms=1e-13)
        if o.get("use_denominator", True):
            assert_close(state.normalizer, z, rel_rms=1e-13)
    f = np.array([armt.dpfp(u, nu) for u in queries])
    expected = np.array([armt.recall(one, a, z, o) for one in f])
    o.pop("correction", None)
    assert_close(associative_read(jnp.asarray(f), state, **o), expected, rel_rms=1e-12)
