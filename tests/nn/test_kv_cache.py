"""The ring buffer against a plain list of the last tokens, and attention through it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx_jax.nn.contract import NO_SEGMENT, Documents, Sizes, advance_documents
from longctx_jax.nn.kv_cache import (
    KVCache,
    NewTokens,
    attend_ring,
    extend,
    init_kv_cache,
)
from longctx_jax.nn.mixers.softmax import SoftmaxAttention, SoftmaxConfig
from longctx_jax.nn.ring_lending import at_layer, keep_whole, lend, settle
from longctx_jax.ops.attention import NEVER
from tests.helpers import make_normal, random_variables, sub_jaxprs

CAPACITY, BATCH = 5, 2
TOKENS = make_normal(0, BATCH, 96, 1, 3).astype(np.float32)
DOCUMENTS = np.cumsum(np.random.default_rng(0).random((BATCH, 96)) < 0.2, axis=1).astype(np.int32)

extend_jitted = jax.jit(extend)
advance_jitted = jax.jit(advance_documents, static_argnums=3)


@given(st.lists(st.sampled_from([1, 5, 7, 11]), max_size=7))
@settings(deadline=None, max_examples=15)
def test_the_ring_holds_the_last_tokens(lengths):
    cache = jax.tree.map(np.asarray, init_kv_cache(BATCH, CAPACITY, 1, 3, 2, "float32"))
    start = 0
    for length in lengths:
        piece = slice(start, start + length)
        key, documents = TOKENS[:, piece], DOCUMENTS[:, piece]
        cache = extend_jitted(cache, key, 2 * key[..., :2], documents)
        start += length
    cache = jax.tree.map(np.asarray, cache)
    kept = list(range(max(0, start - CAPACITY), start))
    assert np.array_equal(cache.position, [start] * BATCH)
    for row in range(BATCH):
        positions = np.asarray(cache.slot_positions[row])
        assert sorted(positions[positions != NEVER]) == kept
        assert np.sum(positions == NEVER) == CAPACITY - len(kept)
        for slot, position in enumerate(positions):
            if position == NEVER:
                continue
            assert slot == position % CAPACITY
            assert np.array_equal(cache.key[row, :, slot], TOKENS[row, position])
            assert np.array_equal(cache.value[row, :, slot], 2 * TOKENS[row, position, :, :2])
            assert cache.slot_documents[row, slot] == DOCUMENTS[row, position]


def test_a_long_call_writes_no_slot_twice():
    """The order of two writes to one place is undefined, though a CPU keeps the last."""
    cache, new = init_kv_cache(BATCH, CAPACITY, 1, 3, 3, "float32"), TOKENS[:, :11]
    jaxpr = jax.make_jaxpr(extend)(cache, new, new, DOCUMENTS[:, :11]).jaxpr
    writes = [e for j in sub_jaxprs(jaxpr) for e in j.eqns if e.primitive.name == "scatter"]
    assert len(writes) == 4
    assert all(write.invars[2].aval.shape[:2] == (BATCH, CAPACITY) for write in writes)


def test_rows_stand_at_their_own_positions():
    cache = init_kv_cache(BATCH, CAPACITY, 1, 3, 3, "float32")
    cache = cache.replace(position=jnp.array([0, 7], jnp.int32))
    cache = extend_jitted(cache, TOKENS[:, :2], TOKENS[:, :2], DOCUMENTS[:, :2])
    expected = [[0, 1, NEVER, NEVER, NEVER], [NEVER, NEVER, 7, 8, NEVER]]
    assert np.array_equal(cache.slot_positions, expected)
    assert np.array_equal(cache.position, [2, 9])


@pytest.mark.slow
def test_a_lent_ring_is_settled_to_the_extended_one():
    mixer = make_mixer(4)
    x = jnp.asarray(make_normal(0, BATCH, 9, 6), jnp.float32)
    index = jnp.asarray(DOCUMENTS[:, :9])
    documents = Documents(index, jnp.diff(index, axis=1, prepend=0) > 0)
    ring = mixer.init_cache(BATCH, 9)
    variables = mixer.init(jax.random.key(0), x, ring, documents, train=False)
    whole = mixer.apply(variables, x, None, documents, train=False)[0]

    @jax.jit
    def step(ring, x, documents):
        return mixer.apply(variables, x, ring, documents, train=False)[:2]

    for t in range(9):
        now = x[:, t : t + 1], Documents(documents.index[:, t : t + 1], None)
        _, extended = step(ring, *now)
        out, token = step(lend({"a": ring})["a"], *now)
        assert isinstance(token, NewTokens)
        np.testing.assert_allclose(out[:, 0], whole[:, t], rtol=1e-5, atol=1e-6)
        stacked = jax.tree.map(lambda leaf: leaf[None], (ring, token))
        settled = jax.tree.map(lambda leaf: leaf[0], settle(*stacked))
        assert jax.tree.structure(settled) == jax.tree.structure(extended)
        for mine, theirs in zip(jax.tree.leaves(settled), jax.tree.leaves(extended), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        ring = extended
    assert isinstance(ring, KVCache) and not ring.is_lent


def test_several_tokens_extend_a_lent_ring():
    ring = init_kv_cache(BATCH, CAPACITY, 1, 3, 3, "float32")
    lent = extend(lend(ring), TOKENS[:, :2], TOKENS[:, :2], DOCUMENTS[:, :2])
    settled = settle(ring, lent)
    assert not settled.is_lent and np.array_equal(settled.position, [2] * BATCH)


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_bytes(dtype, width):
    cache = init_kv_cache(3, 16, 2, 4, 6, dtype)
    assert cache.key.nbytes + cache.value.nbytes == 3 * width * 16 * 2 * (4 + 6)


@pytest.mark.parametrize(
    ("window_len", "max_len", "capacity"), [(0, 9, 9), (4, 9, 4), (9, 4, 4), (4, 4, 4)]
)
def test_capacity(window_len, max_len, capacity):
    cache = make_mixer(window_len).init_cache(2, max_len)
    assert cache.key.shape == (2, 1, capacity, 4) and cache.value.shape == (2, 1, capacity, 4)


def make_mixer(window_len, implementation="auto"):
    sizes = Sizes(d_model=8, n_heads=2, n_kv_heads=1, d_key=4, d_value=4)
    config = SoftmaxConfig(rope_theta=100.0, implementation=implementation)
    return SoftmaxAttention(sizes, config, window_len)


@functools.cache
def runner(window_len, implementation):
    mixer = make_mixer(window_len, implementation)

    def run(variables, x, cache):
        batch, seq, _ = x.shape
        last = (jnp.full(batch, -1), jnp.zeros(batch, jnp.int32))
        documents, *_ = advance_documents(None, *last, seq)
        return mixer.apply(variables, x, cache, documents, train=False)[:2]

    return mixer, jax.jit(run)


@pytest.mark.parametrize(
    "implementation", ["banded", pytest.param("blockwise", marks=pytest.mark.slow)]
)
def test_a_named_form_serves_every_call_of_a_window(implementation):
    """What can train a window can also extend its cache, by any number of tokens."""
    mixer, run = runner(3, implementation)
    x = make_normal(1, 1, 9, 8).astype(np.float32)
    variables = random_variables(lambda: mixer.init(jax.random.key(0), x, None, None, train=False))
    expected = jax.jit(lambda v: mixer.apply(v, x, None, None, train=False)[0])(variables)
    cache, outs = mixer.init_cache(1, 100), []
    for start, stop in [(0, 2), (2, 7), (7, 9)]:
        out, cache = run(variables, x[:, start:stop], cache)
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), expected, atol=2e-6)


# --- documents ---------------------------------------------------------------------------------


def number_documents(ids):
    """The numbers of a row of ids: one more at every change."""
    numbers, resets = [], []
    for t, token_id in enumerate(ids):
        is_new = t > 0 and token_id != ids[t - 1]
        resets.append(is_new)
        numbers.append((numbers[-1] if numbers else 0) + is_new)
    return numbers, resets


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.integers(1, 4), min_size=12)
)
@settings(deadline=None, max_examples=40)
def test_documents_are_numbered_across_calls(ids, lengths):
    last_id, last_index = np.array([NO_SEGMENT], np.int32), np.array([0], np.int32)
    index, reset, start = [], [], 0
    while start < len(ids):
        piece = np.array([ids[start : start + lengths.pop()]], np.int32)
        documents, last_id, last_index = advance_jitted(piece, last_id, last_index, piece.shape[1])
        index += np.asarray(documents.index)[0].tolist()
        reset += np.asarray(documents.reset)[0].tolist()
        start += piece.shape[1]
    assert (index, reset) == number_documents(ids)


def test_without_ids_the_document_goes_on():
    documents, last_id, last_index = advance_documents(
        None, jnp.array([4, -1]), jnp.array([2, 0]), 3
    )
    assert documents.reset is None
    assert np.array_equal(documents.index, [[2, 2, 2], [0, 0, 0]])
    assert np.array_equal(last_id, [4, -1]) and np.array_equal(last_index, [2, 0])


def test_a_loop_over_layers_hands_whole_rings_to_each():
    """As `keep_whole` took them, in order, with the layer number; others stay as they are."""

    def ring(seed):
        shape = (3, BATCH, 1, CAPACITY, 2)
        key, value = (make_normal(seed + i, *shape).astype(np.float32) for i in range(2))
        places = jnp.broadcast_to(jnp.arange(CAPACITY), (3, BATCH, CAPACITY))
        return KVCache(key, value, places, 0 * places, jnp.full((3, BATCH), CAPACITY))

    first, second, own = ring(0), ring(2), ring(4)
    lent = lend({"b": second, "a": first}, stays_whole=True) | {"own": own}
    cut, whole = keep_whole(lent)
    assert cut["a"].key is None and cut["own"] is own and len(whole) == 2
    query, at = jnp.ones((BATCH, 1, 1, 2)), jnp.full((BATCH, 1), CAPACITY - 1)

    def layer(_, inputs):
        number, caches = inputs
        caches = at_layer(caches, whole, number)
        assert caches["a"].key.shape == first.key.shape and caches["own"].layer is None
        outs = [attend_ring(query, caches[name], at, 0 * at, None).out for name in ("a", "b")]
        return None, outs

    _, found = jax.lax.scan(layer, None, (jnp.arange(3), cut))
    for ring_of, out in zip((first, second), found, strict=True):
        for number in range(3):
            alone = jax.tree.map(lambda leaf, number=number: leaf[number], ring_of)
            expected = attend_ring(query, alone, at, 0 * at, None).out
            np.testing.assert_allclose(out[number], expected, rtol=1e-6)
