"""Every front door refuses arrays of other rows or lengths: nothing is broadcast or shifted."""

import jax
import jax.numpy as jnp
import pytest

from longctx_jax.ops.convolution import short_convolution
from longctx_jax.ops.decay import decay_attention, decay_attention_step
from longctx_jax.ops.losses import token_nll
from longctx_jax.ops.memory import associative_read
from longctx_jax.ops.memory.associative import init_memory_state
from longctx_jax.ops.position import rotate
from longctx_jax.ops.rwkv.token_shift import shift_tokens
from longctx_jax.ops.rwkv.wkv4 import init_wkv4_state, wkv4
from longctx_jax.ops.rwkv.wkv6 import wkv6
from longctx_jax.ops.ssm.selective_scan import selective_scan

X = jnp.ones((2, 5, 2, 4))  # [batch, seq, heads, width]
FLAT = jnp.ones((2, 5, 3))
DECAY = jnp.full(2, -0.1)
STATE, ONE_STATE = jnp.zeros((2, 2, 4, 4)), jnp.zeros((1, 2, 4, 4))
ONE_RESET = jnp.zeros((1, 5), bool)
KERNEL = jnp.ones((3, 3))

CASES = {
    "decay state": lambda: decay_attention(X, X, X, DECAY, ONE_STATE),
    "decay reset": lambda: decay_attention(X, X, X, DECAY, reset=ONE_RESET),
    "decay value": lambda: decay_attention(X, X, X[:1], DECAY),
    "step state": lambda: decay_attention_step(X[:, 0], X[:, 0], X[:, 0], DECAY, ONE_STATE),
    "step reset": lambda: decay_attention_step(
        X[:, 0], X[:, 0], X[:, 0], DECAY, STATE, reset=ONE_RESET[:, 0]
    ),
    "wkv6 state": lambda: wkv6(X, X, X, -X, jnp.ones((2, 4)), ONE_STATE),
    "wkv6 reset": lambda: wkv6(X, X, X, -X, jnp.ones((2, 4)), reset=ONE_RESET),
    "wkv4 state": lambda: wkv4(FLAT, FLAT, -jnp.ones(3), jnp.ones(3), init_wkv4_state(1, 3)),
    "wkv4 reset": lambda: wkv4(FLAT, FLAT, -jnp.ones(3), jnp.ones(3), reset=ONE_RESET),
    "scan state": lambda: selective_scan(
        FLAT, FLAT, -jnp.ones((3, 2)), FLAT[..., :2], FLAT[..., :2], None, jnp.zeros((1, 3, 2))
    ),
    "shift last": lambda: shift_tokens(FLAT, jnp.zeros((1, 3))),
    "convolution history": lambda: short_convolution(FLAT, KERNEL, jnp.zeros((1, 2, 3))),
    "convolution width": lambda: short_convolution(FLAT, KERNEL, jnp.zeros((2, 3, 3))),
    "convolution documents": lambda: short_convolution(
        FLAT, KERNEL, jnp.zeros((2, 2, 3)), documents=jnp.zeros((2, 5), jnp.int32)
    ),
    "nll targets": lambda: token_nll(FLAT, jnp.zeros((1, 5), jnp.int32)),
    "rotate positions": lambda: rotate(X, jnp.zeros((2, 4), jnp.int32), 1e4),
    "memory state": lambda: associative_read(FLAT, init_memory_state((1,), 3, 2)),
    "no token": lambda: decay_attention(X[:, :0], X[:, :0], X[:, :0], DECAY),
    "no row": lambda: wkv6(X[:0], X[:0], X[:0], -X[:0], jnp.ones((2, 4))),
}


@pytest.mark.parametrize("name", CASES)
def test_other_rows_are_refused(name):
    with pytest.raises(ValueError, match=r"must (be|have)|need history"):
        CASES[name]()


def test_what_fits_passes_traced_too():
    arrays = (X, X, X, DECAY, STATE)
    assert decay_attention(*arrays)[0].shape == X.shape
    run = jax.eval_shape(lambda *x: decay_attention(*x, reset=jnp.zeros((2, 5), bool)), *arrays)
    assert run[0].shape == X.shape


def test_the_message_says_what_was_given():
    message = r"wkv6: state must be \[batch, heads, key, value\].*got \(1, 2, 4, 4\)"
    with pytest.raises(ValueError, match=message):
        CASES["wkv6 state"]()


def test_an_empty_wkv4_state_can_be_donated():
    arrays = (FLAT, FLAT)
    run = jax.jit(lambda state: wkv4(*arrays, -jnp.ones(3), jnp.ones(3), state), donate_argnums=0)
    run(init_wkv4_state(2, 3))
    pointers = [x.unsafe_buffer_pointer() for x in init_wkv4_state(2, 3)]
    assert len(set(pointers)) == 3
