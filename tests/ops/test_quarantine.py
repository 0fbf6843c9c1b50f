"""NaN or inf in one document: it stays NaN to its end, and no other document of the row knows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops.attention import attention
from longctx_jax.ops.decay import decay_attention, decay_attention_step
from longctx_jax.ops.decay.select import IMPLEMENTATIONS, KERNELS
from longctx_jax.ops.quarantine import find_poison
from longctx_jax.ops.rwkv.wkv4 import init_wkv4_state, wkv4
from longctx_jax.ops.rwkv.wkv6 import wkv6
from longctx_jax.ops.ssm.selective_scan import selective_scan
from longctx_jax.ops.ssm.ssd import ssd
from longctx_jax.ops.vq import vq_attention
from tests.helpers import assert_close, make_normal

SEQ, BAD, NEXT = 11, 3, 6  # the bad token, and the first of the next document
DOCUMENTS = jnp.asarray([[0] * NEXT + [1] * (SEQ - NEXT)], jnp.int32)
RESET = jnp.zeros((1, SEQ), bool).at[0, NEXT].set(True)


def normal(seed, *shape):
    return jnp.float32(make_normal(seed, *shape))


def heads(seed, width=4, n=2):
    return normal(seed, 1, SEQ, n, width)


def of_decay(name, is_gated):
    arrays = {"query": heads(0), "key": heads(1), "value": heads(2, 3)}
    decay = -jax.nn.softplus(normal(3, 1, SEQ, 2)) if is_gated else jnp.float32([-0.1, -0.5])
    if is_gated:
        arrays["log_decay"] = decay

    def run(**given):
        given = {"log_decay": decay, **given}
        return decay_attention(**given, reset=RESET, chunk_len=4, implementation=name)

    return run, arrays


def of_attention(name):
    arrays = {"query": heads(0), "key": heads(1), "value": heads(2)}
    window = {"window_len": 4} if name == "banded" else {}
    return (
        lambda **given: (
            attention(**given, segment_ids=DOCUMENTS, implementation=name, **window),
            (),
        )
    ), arrays


def of_vq(name):
    arrays = {"query": heads(0), "key": heads(1), "value": heads(2)}
    options = {"window_len": 2, "block_len": 3, "documents": DOCUMENTS, "implementation": name}

    def run(**given):
        out = vq_attention(**given, codebook=normal(5, 2, 4, 4), **options)
        return out.out, ()

    return run, arrays


def of_wkv4(name):
    arrays = {"key": normal(0, 1, SEQ, 3), "value": normal(1, 1, SEQ, 3)}
    rates = {"decay_rate": -jnp.ones(3), "bonus": jnp.ones(3)}
    return functools.partial(wkv4, **rates, reset=RESET, implementation=name, chunk_len=4), arrays


def of_wkv6(name):
    arrays = {"receptance": heads(0), "key": heads(1), "value": heads(2)}
    arrays["log_decay"] = -jax.nn.softplus(heads(3))
    options = {"reset": RESET, "implementation": name, "chunk_len": 4}
    return functools.partial(wkv6, bonus=jnp.ones((2, 4)), **options), arrays


def of_scan(name):
    arrays = {"u": normal(0, 1, SEQ, 3), "delta": jax.nn.softplus(normal(1, 1, SEQ, 3))}
    arrays |= {"b": normal(2, 1, SEQ, 2), "c": normal(3, 1, SEQ, 2)}
    options = {"reset": RESET, "implementation": name, "chunk_len": 4}
    return functools.partial(selective_scan, a=-jnp.ones((3, 2)), d=jnp.ones(3), **options), arrays


def of_ssd(name):
    arrays = {"u": heads(0), "delta": jax.nn.softplus(normal(1, 1, SEQ, 2)), "b": heads(2, n=1)}
    arrays["c"] = heads(3, n=1)
    options = {"reset": RESET, "implementation": name, "chunk_len": 4}
    return functools.partial(ssd, a=-jnp.ones(2), d=jnp.ones(2), **options), arrays


FORMS = {
    f"decay {form.name}{' gated' if is_gated else ''}": (of_decay, form.name, is_gated)
    for form in IMPLEMENTATIONS
    for is_gated in (False, True)
    if form.name not in KERNELS and not (is_gated and form.name in ("recursion", "fleet", "prefix"))
}
FORMS |= {f"attention {n}": (of_attention, n) for n in ("dense", "banded", "blockwise")}
FORMS |= {f"vq {n}": (of_vq, n) for n in ("linear", "quadratic")}
FORMS |= {f"wkv4 {n}": (of_wkv4, n) for n in ("recurrent", "chunked")}
FORMS |= {f"wkv6 {n}": (of_wkv6, n) for n in ("recurrent", "chunked")}
FORMS |= {f"scan {n}": (of_scan, n) for n in ("recurrent", "serial", "chunked")}
FORMS |= {"ssd chunked": (of_ssd, "chunked")}
FAST = ("decay two_pass", "attention dense")


@pytest.mark.parametrize("bad", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FORMS]
)
def test_a_broken_document_breaks_no_other(name, bad):
    make, *form = FORMS[name]
    op, arrays = make(*form)
    run = jax.jit(lambda **given: op(**given))
    clean, after = run(**arrays)
    for broken in arrays:
        given = {**arrays, broken: arrays[broken].at[0, BAD, ..., 0].set(bad)}
        out, state = run(**given)
        assert_close(out[:, :BAD], clean[:, :BAD], rel_rms=1e-6)
        assert_close(out[:, NEXT:], clean[:, NEXT:], rel_rms=1e-6)
        if broken not in ("query", "receptance", "c"):  # those concern their own token
            assert not np.isfinite(out[:, BAD : BAD + 1]).all()
        jax.tree.map(lambda a, b: assert_close(a, b, rel_rms=1e-6), state, after)

    def loss(given):  # of the other document alone, as a weight of 0 leaves it
        return jnp.sum(run(**given)[0][:, NEXT:] ** 2)

    last = list(arrays)[-1]
    given = {**arrays, last: arrays[last].at[0, BAD, ..., 0].set(bad)}
    gradients = jax.jit(jax.grad(loss))
    for gradient, other in zip(
        *(jax.tree.leaves(gradients(x)) for x in (given, arrays)), strict=True
    ):
        assert_close(gradient, other, rel_rms=1e-5)


@pytest.mark.slow
def test_a_broken_state_ends_with_its_document():
    state = jnp.full((1, 2, 4, 3), jnp.nan)
    arrays = (heads(0), heads(1), heads(2, 3), jnp.float32([-0.1, -0.5]))
    out, last = decay_attention(*arrays, state, reset=RESET, chunk_len=4)
    alone, expected = decay_attention(*arrays, reset=RESET, chunk_len=4)
    assert np.isnan(out[:, :NEXT]).all()
    assert_close(out[:, NEXT:], alone[:, NEXT:], rel_rms=1e-6)
    assert_close(last, expected, rel_rms=1e-6)
    token = [x[:, 0] for x in arrays[:3]]
    options = {"reset": jnp.asarray([True])}
    _, kept = decay_attention_step(*token, arrays[3], state, **options)
    _, fresh = decay_attention_step(*token, arrays[3], jnp.zeros_like(state), **options)
    assert_close(kept, fresh, rel_rms=1e-6)
    keys = (normal(0, 1, SEQ, 3), normal(1, 1, SEQ, 3), -jnp.ones(3), jnp.ones(3))
    nothing = init_wkv4_state(1, 3)
    broken = nothing._replace(numerator=jnp.full((1, 3), jnp.inf))
    out, _ = wkv4(*keys, broken, reset=RESET)
    assert_close(out[:, NEXT:], wkv4(*keys, reset=RESET)[0][:, NEXT:], rel_rms=1e-6)


def test_poison_reaches_to_the_end_of_a_document():
    bad = jnp.asarray([[0, 1, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]], bool)
    reset = jnp.asarray([[0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]], bool)
    state = jnp.asarray([[0.0], [jnp.nan]])
    reached = find_poison(bad, reset, state).reached
    assert reached.astype(int).tolist() == [[0, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0]]
    assert find_poison(bad, None, state).reached.astype(int).tolist() == [
        [0, 1, 1, 1, 1, 1],
        [1] * 6,
    ]
