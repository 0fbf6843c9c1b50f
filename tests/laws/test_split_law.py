"""However a sequence is split into cached calls, the logits are those of one call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx_jax.models import build_model
from tests.helpers import assert_close
from tests.laws.cases import (
    BATCH,
    CASES,
    MIXTURES,
    SEGMENTS,
    SEQ,
    TOKENS,
    build,
    laws,
    variables_of,
)

CALLS = (1, 3, 8)  # tokens a call; few, because each length is compiled
TOLERANCE = 2e-6  # seen: 5e-7

split = given(st.lists(st.sampled_from(CALLS), min_size=1, max_size=6))
quick = settings(deadline=None, max_examples=12)


@pytest.fixture(scope="module", params=laws((*CASES, *MIXTURES)))
def model(request):
    return build(request.param)


@functools.cache
def one_call(model, has_segments):
    """Returns the logits of the whole sequence, without a cache."""
    segments = SEGMENTS if has_segments else None
    return np.asarray(model.apply(variables_of(model), TOKENS, segment_ids=segments).logits)


def in_calls(model, lengths, has_segments, max_len, expected):
    """Feeds the first tokens in calls and compares with the first rows of `expected`."""
    cache, start, logits = model.init_cache(BATCH, max_len), 0, []
    shapes = jax.tree.map(jnp.shape, cache)
    for length in lengths:
        piece = slice(start, min(start + length, SEQ))
        if piece.stop - piece.start < length:
            break
        segments = SEGMENTS[:, piece] if has_segments else None
        out = model.apply(variables_of(model), TOKENS[:, piece], cache, segment_ids=segments)
        cache = out.cache
        logits.append(out.logits)
        start = piece.stop
    assert jax.tree.map(jnp.shape, cache) == shapes
    logits = np.concatenate(logits, axis=1)
    assert_close(logits, expected[:, :start], rel_rms=TOLERANCE, max_abs=1e-4)


@split
@quick
def test_any_split_is_the_one_call(model, lengths):
    in_calls(model, lengths, True, SEQ, one_call(model, True))


@pytest.mark.slow
@split
@quick
def test_any_split_without_segment_ids(model, lengths):
    in_calls(model, lengths, False, SEQ, one_call(model, False))


@functools.cache
def small_memory():
    """Returns full attention, and the logits of the same weights in a window of 6 tokens."""
    fields = {"n_layers": 2, "d_model": 16, "n_heads": 2, "vocab_size": 11, "d_ff": 24}
    model = build_model(fields)
    twin = build_model({**fields, "pattern": ("sliding",), "sliding": {"window_len": 6}})
    params = variables_of(model)["params"]
    params = {**params, "stack": {"0_sliding": params["stack"]["0_softmax"]}}
    variables = {"params": params, "model_state": {}}
    return model, np.asarray(twin.apply(variables, TOKENS, segment_ids=SEGMENTS).logits)


@pytest.mark.slow
@split
@quick
def test_a_stream_longer_than_the_cache(lengths):
    """Full attention with room for 6 tokens is attention in a window of 6, at any split."""
    model, expected = small_memory()
    in_calls(model, lengths, True, 6, expected)


def test_rows_at_different_positions(model):
    """Rows of a cache are independent streams: gathered from two calls, they go on as before."""
    expected, empty = one_call(model, True), model.init_cache(BATCH, SEQ)
    run = functools.partial(model.apply, variables_of(model))
    short = run(TOKENS[:, :3], empty, segment_ids=SEGMENTS[:, :3]).cache
    long = run(TOKENS[:, :8], empty, segment_ids=SEGMENTS[:, :8]).cache

    is_first = np.array([True, False])

    def gather(axis):  # row 0 of one, row 1 of the other
        shape = [1] * axis + [BATCH]
        return lambda a, b: np.where(is_first.reshape(shape + [1] * (a.ndim - len(shape))), a, b)

    mixed = short.replace(
        layers=jax.tree.map(gather(1), short.layers, long.layers),
        last_segment_id=gather(0)(short.last_segment_id, long.last_segment_id),
        document=gather(0)(short.document, long.document),
    )
    tokens, segments = (np.stack([x[0, 3:11], x[1, 8:16]]) for x in (TOKENS, SEGMENTS))
    logits = run(tokens, mixed, segment_ids=segments).logits
    assert_close(logits[0], expected[0, 3:11], rel_rms=TOLERANCE)
    assert_close(logits[1], expected[1, 8:16], rel_rms=TOLERANCE)


def test_packed_documents_equal_separate_runs(model):
    logits, empty = one_call(model, True), model.init_cache(BATCH, SEQ)
    length = 8  # the same for all: compiled once
    for row, (start, stop) in [(0, (2, 11)), (0, (12, 24)), (1, (0, 10))]:
        assert start + length <= stop
        tokens = TOKENS[[row] * BATCH, start : start + length]
        segments = np.zeros(tokens.shape, np.int32)
        alone = model.apply(variables_of(model), tokens, empty, segment_ids=segments).logits
        assert_close(alone[0], logits[row, start : start + length], rel_rms=TOLERANCE)


def test_keys_without_positions_are_a_set():
    fields = {"n_layers": 1, "d_model": 16, "n_heads": 2, "vocab_size": 11, "d_ff": 24}
    model = build_model({**fields, "softmax": {"position": "none"}})
    logits = one_call(model, False)
    shuffled = TOKENS.copy()
    shuffled[:, :-1] = TOKENS[:, -2::-1]
    again = model.apply(variables_of(model), shuffled).logits
    assert_close(again[:, -1], logits[:, -1], rel_rms=TOLERANCE)
