"""The codebook: nearest code, straight-through, statistics, moving averages, dead codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops.vq import codebook as cb
from longctx_jax.ops.vq import nearest_code
from tests.helpers import assert_close, in_float64, make_normal

HEADS, CODES, KEY = 2, 7, 3
VECTORS = make_normal(0, 2, 5, HEADS, KEY).astype(np.float32)
CODEBOOK = make_normal(1, HEADS, CODES, KEY).astype(np.float32)


def by_hand(vectors, codebook):
    distance = ((vectors[..., None, :] - codebook) ** 2).sum(-1)
    return distance.argmin(-1), distance.min(-1)


def test_nearest_code_is_the_argmin():
    codes, error = nearest_code(jnp.asarray(VECTORS), jnp.asarray(CODEBOOK))
    expected, distance = by_hand(VECTORS.astype(np.float64), CODEBOOK.astype(np.float64))
    assert codes.dtype == jnp.int32 and np.array_equal(codes, expected)
    assert_close(error, distance, rel_rms=1e-6)


def test_ties_go_to_the_lowest_code():
    codebook = np.concatenate([CODEBOOK, CODEBOOK], axis=1)[:, ::-1].copy()
    codes, _ = nearest_code(jnp.asarray(VECTORS), jnp.asarray(codebook))
    assert np.array_equal(codes, by_hand(VECTORS, codebook)[0]) and np.max(codes) < CODES


def test_a_vector_that_is_not_a_number_gets_a_code():
    codes, error = nearest_code(jnp.full((1, HEADS, KEY), jnp.nan), jnp.asarray(CODEBOOK))
    assert np.all((codes >= 0) & (codes < CODES)) and np.isnan(error).all()


def test_many_vectors_are_searched_in_pieces(monkeypatch):
    whole = cb.search_codes(jnp.asarray(VECTORS), jnp.asarray(CODEBOOK))
    monkeypatch.setattr(cb, "DISTANCES_AT_ONCE", 3 * HEADS * CODES)  # 10 vectors: 4 pieces
    pieces = cb.search_codes(jnp.asarray(VECTORS), jnp.asarray(CODEBOOK))
    assert np.array_equal(pieces, whole)


@in_float64
def test_straight_through_and_commitment_gradients():
    vectors, codebook = jnp.asarray(VECTORS, jnp.float64), jnp.asarray(CODEBOOK, jnp.float64)
    codes, _ = nearest_code(vectors, codebook)
    weight = jnp.asarray(make_normal(2, *VECTORS.shape))

    def loss(vectors, codebook):
        quantized = cb.quantize(vectors, codebook, codes)
        return jnp.sum(weight * quantized.vectors), jnp.sum(quantized.squared_error)

    word = cb.look_up(codebook, codes)
    assert np.array_equal(cb.quantize(vectors, codebook, codes).vectors, word)
    through = jax.grad(lambda *x: loss(*x)[0], (0, 1))(vectors, codebook)
    commit = jax.grad(lambda *x: loss(*x)[1], (0, 1))(vectors, codebook)
    assert_close(through[0], weight, rel_rms=1e-14)
    assert_close(commit[0], 2 * (vectors - word), rel_rms=1e-14)
    assert not np.any(through[1]) and not np.any(commit[1])
    error = jax.grad(lambda v: jnp.sum(nearest_code(v, codebook)[1]))(vectors)
    assert_close(error, commit[0], rel_rms=1e-14)


@pytest.mark.parametrize("has_weights", [False, True])
def test_statistics_are_sums_over_counted_tokens(has_weights):
    codes, _ = nearest_code(jnp.asarray(VECTORS), jnp.asarray(CODEBOOK))
    weights = np.random.default_rng(0).integers(0, 2, VECTORS.shape[:2]).astype(np.float32)
    given = jnp.asarray(weights) if has_weights else None
    counts, sums = cb.code_statistics(jnp.asarray(VECTORS), codes, CODES, given)
    expected_counts, expected_sums = np.zeros((HEADS, CODES)), np.zeros((HEADS, CODES, KEY))
    for b, t, h in np.ndindex(VECTORS.shape[:3]):
        weight = weights[b, t] if has_weights else 1.0
        expected_counts[h, codes[b, t, h]] += weight
        expected_sums[h, codes[b, t, h]] += weight * VECTORS[b, t, h]
    assert np.array_equal(counts, expected_counts)
    assert_close(sums, expected_sums, rel_rms=1e-6)


def make_codebook(counts):
    counts = jnp.asarray(counts, jnp.float32)
    return cb.Codebook(jnp.asarray(CODEBOOK) * counts[..., None], counts)


def test_an_update_is_the_moving_average():
    old = make_codebook(np.full((HEADS, CODES), 2.0))
    new = cb.CodeStatistics(jnp.full((HEADS, CODES), 6.0), 6.0 * jnp.asarray(CODEBOOK[:, ::-1]))
    updated = cb.update_codebook(old, new, decay=0.75)
    assert_close(updated.counts, np.full((HEADS, CODES), 3.0), rel_rms=1e-7)
    expected = (0.75 * 2 * CODEBOOK + 0.25 * 6 * CODEBOOK[:, ::-1]) / 3
    assert_close(cb.codewords(updated), expected, rel_rms=1e-6)


def test_unused_codes_are_safe():
    counts = np.array([[0.0, 1e-3, 0.01, 1, 10, 100, 1e6]] * HEADS)
    clip = cb.codewords(make_codebook(counts))
    assert_close(clip, CODEBOOK * np.minimum(counts / 0.01, 1.0)[..., None], rel_rms=1e-6)
    assert np.isfinite(cb.codewords(make_codebook(np.zeros((HEADS, CODES))))).all()


def test_codewords_get_no_gradient():
    codebook = make_codebook(np.ones((HEADS, CODES)))
    gradient = jax.grad(lambda c: jnp.sum(cb.codewords(c) ** 2))(codebook)
    assert not any(np.any(x) for x in gradient)


@pytest.mark.parametrize(("start", "length"), [("sphere", KEY**0.25), ("published", None)])
def test_the_first_codebook(start, length):
    codebook = cb.init_codebook(jax.random.key(0), 2, 400, KEY, start)
    words = np.asarray(cb.codewords(codebook))
    if length:
        assert_close(np.linalg.norm(words, axis=-1), np.full((2, 400), length), rel_rms=1e-6)
    else:
        assert_close(np.var(words) * 2 * 400, 1.0, rel_rms=0.1)


@pytest.mark.slow
def test_a_dead_code_takes_half_of_a_busy_one():
    counts = np.array([[0.1, 40.0, 5, 5, 5, 5, 5], [3.0, 4, 5, 6, 7, 8, 9]])
    old = make_codebook(counts)
    new = cb.reseed_dead_codes(old, jax.random.key(0), below=1.0)
    words, before = np.asarray(cb.codewords(new)), np.asarray(cb.codewords(old))
    assert np.array_equal(new.counts[1], counts[1]) and np.array_equal(words[1], before[1])
    assert np.array_equal(new.counts[0, :2], [20.0, 20.0])
    assert_close(words[0, :2].mean(0), before[0, 1], rel_rms=1e-6)
    distance = np.linalg.norm(words[0, :2] - before[0, 1], axis=-1)
    assert_close(distance, np.full(2, 0.01 * np.linalg.norm(before[0, 1])), rel_rms=1e-3)
    assert_close(words[0, 2:], before[0, 2:], rel_rms=1e-7)


@pytest.mark.slow
def test_reseeding_takes_a_leading_axis():
    counts = np.array([[0.1, 40.0, 5, 5, 5, 5, 5], [3.0, 4, 5, 6, 7, 8, 9]])
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), make_codebook(counts))
    new = cb.reseed_dead_codes(stacked, jax.random.key(0), below=1.0)
    assert new.sums.shape == (2, HEADS, CODES, KEY) and np.array_equal(
        new.counts[:, 0, :2], np.full((2, 2), 20.0)
    )


def test_the_report():
    counts = np.array([[8.0, 8, 0, 0, 0, 0, 0], [1.0] * 7])
    report = cb.codebook_report(make_codebook(counts))
    assert_close(report["perplexity"], [2.0, 7.0], rel_rms=1e-6)
    assert_close(report["dead_fraction"], [5 / 7, 0.0], rel_rms=1e-6)


def test_a_codebook_of_other_heads():
    with pytest.raises(ValueError, match=r"codebook must be .* width \(2, 3\): got \(1, 7, 3\)"):
        nearest_code(jnp.asarray(VECTORS), jnp.asarray(CODEBOOK[:1]))


@pytest.mark.parametrize("offset", [10.0, 1_000.0, 10_000.0])
def test_nearest_code_under_a_common_offset(offset):
    """Distances do not know the origin: keys and codewords far from it have the same codes."""
    vectors, codebook = make_normal(5, 512, 1, 8), make_normal(6, 1, 64, 8)
    shifted = np.float32(vectors + offset), np.float32(codebook + offset)
    wide = [np.float64(x) for x in shifted]
    distance = np.sum((wide[0][:, :, None] - wide[1][None]) ** 2, axis=-1)
    codes, _ = nearest_code(*map(jnp.asarray, shifted))
    chosen = np.take_along_axis(distance, np.asarray(codes)[..., None], axis=-1)[..., 0]
    assert np.max(chosen / distance.min(axis=-1)) < 1 + 1e-3 * max(1.0, offset / 1_000)
