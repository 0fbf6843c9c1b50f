"""Token shift, wkv4 and wkv6: each form against its definition as one sum over all past tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops.rwkv import WKV4State, init_wkv4_state, shift_tokens, wkv4, wkv6
from tests.helpers import assert_trees_close, in_float64, make_normal

BATCH = 2
FORMS = ("recurrent", "chunked")
LENGTHS = (1, 3, 4, 5, 11)  # with chunks of 4: one token, chunk - 1, chunk, chunk + 1, several
FLOAT64, FLOAT64_GRADIENT = 1e-14, 1e-13  # seen: 3e-16, 5e-15
FLOAT32, FLOAT32_GRADIENT = 5e-7, 2e-6  # seen: 1e-7, 7e-7


def floats(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def resets(seq):
    """Returns document starts, among them the very first token of row 0."""
    starts = np.zeros((BATCH, seq), bool)
    starts[0, [0, seq // 2]] = True
    starts[1, [seq // 3, seq - 1]] = True
    return jnp.asarray(starts)


def documents(reset, seq):
    return jnp.cumsum(jnp.zeros((BATCH, seq), int) if reset is None else jnp.asarray(reset), axis=1)


# --- the definitions ---------------------------------------------------------------------------


def wkv4_definition(key, value, decay_rate, bonus, state, reset):
    """A softmax over (what the state stands for, every past token, the current one)."""
    seq, document = key.shape[1], documents(reset, key.shape[1])
    time = jnp.arange(seq)
    tokens = jnp.concatenate([(state.numerator / state.denominator)[:, None], value], axis=1)
    weights = jnp.concatenate(
        [(state.log_scale + jnp.log(state.denominator))[:, None], key], axis=1
    )
    owner = jnp.concatenate([jnp.zeros((BATCH, 1), int), document], axis=1)
    place = jnp.concatenate([jnp.zeros(1, int) - 1, time])  # the state: just before token 0

    def logits(now, owner_now):  # of an average read just before token `now`
        age = (now[:, None] - 1 - place)[..., None]
        seen = (age[None] >= 0) & (owner[:, None] == owner_now[..., None])[..., None]
        return jnp.where(seen, weights[:, None] + age * decay_rate, -jnp.inf)

    past = logits(time, document)
    current = (bonus + key)[:, :, None]
    p = jax.nn.softmax(jnp.concatenate([past, current], axis=2), axis=2)
    out = jnp.einsum("btsd,bsd->btd", p[:, :, :-1], tokens) + p[:, :, -1] * value
    last = logits(jnp.array([seq]), document[:, -1:])[:, 0]
    mean = jnp.sum(jax.nn.softmax(last, axis=1) * tokens, axis=1)
    return out, (mean, jax.scipy.special.logsumexp(last, axis=1))


def wkv6_definition(receptance, key, value, log_decay, bonus, state, reset):
    """Every pair of tokens, with the decays between them added up one pair at a time."""
    seq, document = key.shape[1], documents(reset, key.shape[1])
    time = jnp.arange(seq + 1)
    between = (time[:seq] > time[:seq, None])[None] & (time[:seq] < time[:, None, None])
    decays = jnp.where(between[None, ..., None, None], log_decay[:, None, None], 0.0)
    kept = jnp.exp(jnp.sum(decays, axis=3))  # [b, t, s, h, k], t up to the end
    owner = jnp.concatenate([document, document[:, -1:]], axis=1)
    seen = (time[:, None] > time[:seq]) & (owner[..., None] == document[:, None])
    kept = kept * seen[..., None, None]
    before = jnp.where((time[:, None] > time[:seq])[None, ..., None, None], log_decay[:, None], 0)
    start = jnp.exp(jnp.sum(before, axis=2)) * (owner == 0)[..., None, None]  # [b, t, h, k]

    scores = jnp.einsum("bthk,btshk,bshk->btsh", receptance, kept[:, :-1], key)
    scores += (
        jnp.eye(seq)[..., None]
        * jnp.einsum("bthk,hk,bthk->bth", receptance, bonus, key)[:, :, None]
    )
    out = jnp.einsum("btsh,bshv->bthv", scores, value)
    out += jnp.einsum("bthk,bhkv->bthv", receptance * start[:, :-1], state)
    written = jnp.einsum("bshk,bshv->bhkv", kept[:, -1] * key, value)
    return out, start[:, -1][..., None] * state + written


# --- inputs, and one call of either op ---------------------------------------------------------


def wkv4_inputs(seq):
    state = WKV4State(
        make_normal(4, BATCH, 3), np.exp(make_normal(5, BATCH, 3)), make_normal(6, BATCH, 3)
    )
    key, value = make_normal(0, BATCH, seq, 3, scale=3.0), make_normal(1, BATCH, seq, 3)
    return key, value, -np.exp(make_normal(2, 3)), make_normal(3, 3), state


def wkv6_inputs(seq, heads=2, d_key=5, d_value=3):
    shape = (BATCH, seq, heads)
    return (
        make_normal(0, *shape, d_key),
        make_normal(1, *shape, d_key),
        make_normal(2, *shape, d_value),
        -np.exp(make_normal(3, *shape, d_key, scale=2.0)),
        make_normal(4, heads, d_key),
        make_normal(5, BATCH, heads, d_key, d_value),
    )


def comparable(state):
    """Returns the state with its scale taken out, as the definition has it."""
    if isinstance(state, WKV4State):
        return state.numerator / state.denominator, state.log_scale + jnp.log(state.denominator)
    return state


def run(op, form, inputs, reset=None, chunk_len=4):
    *tokens, state = inputs
    out, state = op(*tokens, state, reset=reset, implementation=form, chunk_len=chunk_len)
    return out, comparable(state)


DEFINITIONS = {wkv4: wkv4_definition, wkv6: wkv6_definition}
INPUTS = {wkv4: wkv4_inputs, wkv6: wkv6_inputs}
each_op = pytest.mark.parametrize("op", [wkv4, wkv6], ids=["wkv4", "wkv6"])
each_form = pytest.mark.parametrize("form", FORMS)
mostly_chunked = pytest.mark.parametrize(
    "form", ["chunked", pytest.param("recurrent", marks=pytest.mark.slow)]
)


def with_gradients(function, inputs, reset):
    """Returns the result of function(inputs, reset) and the gradients of a loss on all of it."""

    @jax.jit
    def both(inputs):
        def loss(inputs):
            result = function(inputs, reset)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(result)), result

        return jax.grad(loss, has_aux=True)(inputs)

    gradients, result = both(jax.tree.map(jnp.asarray, inputs))
    return result, gradients


@functools.cache
@in_float64
def expected(op, seq, has_resets):
    definition = DEFINITIONS[op]
    reset = resets(seq) if has_resets else None
    call = with_gradients(lambda inputs, reset: definition(*inputs, reset), INPUTS[op](seq), reset)
    return jax.tree.map(np.asarray, call)


CASES = [
    pytest.param(
        *(form, seq, has_resets),
        id=f"{form}-{seq}-{'resets' if has_resets else 'one_document'}",
        marks=() if (form, seq, has_resets) == ("chunked", 11, True) else pytest.mark.slow,
    )
    for form in FORMS
    for seq in LENGTHS
    for has_resets in (True, False)
]


@each_op
@pytest.mark.parametrize(("form", "seq", "has_resets"), CASES)
@in_float64
def test_equals_the_definition_in_float64(op, form, seq, has_resets):
    reset = resets(seq) if has_resets else None
    function = functools.partial(run, op, form)
    result, gradients = with_gradients(function, INPUTS[op](seq), reset)
    assert_trees_close(result, expected(op, seq, has_resets)[0], rel_rms=FLOAT64)
    assert_trees_close(gradients, expected(op, seq, has_resets)[1], rel_rms=FLOAT64_GRADIENT)


@pytest.mark.slow
@each_op
@mostly_chunked
def test_equals_the_definition_in_float32(op, form):
    inputs = floats(INPUTS[op](11))
    function = functools.partial(run, op, form)
    result, gradients = with_gradients(function, inputs, resets(11))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(result))
    assert_trees_close(result, expected(op, 11, True)[0], rel_rms=FLOAT32)
    assert_trees_close(gradients, expected(op, 11, True)[1], rel_rms=FLOAT32_GRADIENT)


@pytest.mark.slow
@each_op
@mostly_chunked
@pytest.mark.parametrize("cut", [1, pytest.param(6, marks=pytest.mark.slow)])
@in_float64
def test_two_calls_are_one(op, form, cut):
    *tokens, state = jax.tree.map(jnp.asarray, INPUTS[op](11))
    n_tokens = 2 if op is wkv4 else 4
    reset, call = resets(11), jax.jit(functools.partial(op, implementation=form, chunk_len=4))

    def part(piece, state):
        pieces = [x[:, piece] if i < n_tokens else x for i, x in enumerate(tokens)]
        return call(*pieces, state, reset=reset[:, piece])

    first, state = part(slice(0, cut), state)
    rest, state = part(slice(cut, None), state)
    whole = expected(op, 11, True)[0]
    result = jnp.concatenate([first, rest], axis=1), comparable(state)
    assert_trees_close(result, whole, rel_rms=FLOAT64)


@pytest.mark.slow
@each_op
def test_no_state_is_the_empty_state(op):
    *tokens, state = floats(INPUTS[op](5))
    empty = init_wkv4_state(BATCH, 3) if op is wkv4 else jnp.zeros_like(state)
    assert_trees_close(op(*tokens), op(*tokens, empty), rel_rms=0.0)
    starts = jnp.eye(5, dtype=bool)[
        jnp.array([0, 0])
    ]  # a document that starts at once sees no state
    assert_trees_close(op(*tokens, state, reset=starts), op(*tokens), rel_rms=1e-7)


@pytest.mark.slow
@each_op
@each_form
def test_bfloat16_inputs_keep_a_float32_state(op, form):
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), INPUTS[op](11))
    *tokens, _ = narrow
    state = floats(narrow[-1])
    reset = resets(11)
    call = jax.jit(functools.partial(op, implementation=form, chunk_len=4))
    out, last = call(*tokens, state, reset=reset)
    assert out.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(last))
    rounded = floats(narrow)
    exact = jax.jit(DEFINITIONS[op])(*rounded, reset)
    assert_trees_close((out, comparable(last)), exact, rel_rms=5e-3)  # seen: 2e-3


@pytest.mark.slow
def test_jit_vmap_and_grad_compose():
    inputs = [floats(np.stack([x, 2 * x, x / 2])) for x in wkv6_inputs(5)]
    reset = resets(5)

    def loss(*inputs):
        return jnp.sum(jnp.sin(run(wkv6, "chunked", inputs, reset)[0]))

    gradient = jax.grad(loss, argnums=tuple(range(6)))
    together = jax.jit(jax.vmap(gradient))(*inputs)
    alone = jax.jit(gradient)
    for i in range(3):
        one = alone(*(x[i] for x in inputs))
        assert_trees_close(tuple(x[i] for x in together), one, rel_rms=1e-6)


# --- extremes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_len", [16, pytest.param(32, marks=pytest.mark.slow)])
def test_strong_decays_are_exact(chunk_len):
    """Decays of every strength side by side, over several runs of a chunk."""
    inputs = list(floats(wkv6_inputs(21)))
    strengths = [0.0, -1e-3, -0.5, -20.0, -300.0, -np.inf]
    inputs[3] = floats(np.random.default_rng(0).choice(strengths, inputs[3].shape))
    form = functools.partial(run, wkv6, "chunked", chunk_len=chunk_len)
    result, gradients = with_gradients(form, inputs, None)
    with jax.enable_x64(True):
        exact = jax.jit(wkv6_definition)(*(jnp.float64(x) for x in inputs), None)
    assert_trees_close(result, exact, rel_rms=FLOAT32)  # seen: 8e-8
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


@mostly_chunked
def test_keys_of_any_size(form):
    """Weights of exp(+-1e4): the average is of the largest, and nothing overflows."""
    key, value, decay_rate, bonus, state = wkv4_inputs(11)
    inputs = (np.sign(key) * 1e4 + key, value, 1e3 * decay_rate, bonus, state)
    function = functools.partial(run, wkv4, form)
    result, gradients = with_gradients(function, floats(inputs), None)
    with jax.enable_x64(True):
        rounded = jax.tree.map(jnp.float64, floats(inputs))
        exact = jax.jit(wkv4_definition)(*rounded, None)
    assert_trees_close(result, exact, rel_rms=1e-4)  # 1e4 is known to 5e-4; seen: 3e-5
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


# --- token shift -------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_token_shift(cut):
    x, before = floats((make_normal(0, BATCH, 7, 3), make_normal(1, BATCH, 3)))
    reset = resets(7)
    shifted = jnp.concatenate([before[:, None], x[:, :-1]], axis=1) * ~reset[..., None]
    if cut:
        first, last = shift_tokens(x[:, :cut], before, reset=reset[:, :cut])
        rest, last = shift_tokens(x[:, cut:], last, reset=reset[:, cut:])
        result = jnp.concatenate([first, rest], axis=1)
    else:
        result, last = shift_tokens(x, before, reset=reset)
    assert np.array_equal(result, shifted) and np.array_equal(last, x[:, -1])
    fresh, _ = shift_tokens(x)
    assert np.array_equal(fresh[:, 0], np.zeros((BATCH, 3))) and np.array_equal(
        fresh[:, 1:], x[:, :-1]
    )


# --- errors ------------------------------------------------------------------------------------


@each_op
def test_mistakes(op):
    *tokens, state = floats(INPUTS[op](3))
    with pytest.raises(ValueError, match=r"one of \['auto', 'chunked', 'recurrent'\]: got 'fast'"):
        op(*tokens, state, implementation="fast")
    with pytest.raises(ValueError, match="chunk_len must be at least 1: got 0"):
        op(*tokens, state, chunk_len=0)
    *none, state = floats(INPUTS[op](0))
    with pytest.raises(ValueError, match="at least one row and one token: got shape"):
        op(*none, state)


def test_auto_takes_one_step_for_one_token():
    *tokens, state = floats(wkv6_inputs(1))
    program = str(jax.make_jaxpr(lambda *x: wkv6(*x))(*tokens, state))
    assert "cumsum" not in program
    *tokens, state = floats(wkv6_inputs(2))
    assert "cumsum" in str(jax.make_jaxpr(lambda *x: wkv6(*x))(*tokens, state))
