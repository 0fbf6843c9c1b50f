"""Positions: exact angles everywhere, relative scores, buckets, the shift of Transformer-XL."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops.position import (
    DistanceBias,
    RotaryScaling,
    alibi_slopes,
    distance_bias,
    position_angles,
    relative_bucket,
    rotary_amplitude,
    rotary_frequencies,
    rotate,
    sinusoid,
)
from tests.helpers import assert_close, make_normal

POSITIONS = np.array([0, 1, 255, 256, 65_535, 65_536, 5_000_000, 2**24 + 1, 2**30 + 7, 2**31 - 1])
ANGLE_TOLERANCE = 2e-4  # radians; seen: 9e-5


def test_frequencies():
    assert_close(rotary_frequencies(4, 100.0), [1.0, 0.1], rel_rms=1e-15)


# (theta, scaling) -> frequencies by index at width 128, of transformers 5.23 (its float32)
PUBLISHED = {
    "LLaMA 3.1": (
        (500_000.0, RotaryScaling("llama3", 8.0, 8192, 1.0, 4.0)),
        {0: 1.0, 20: 0.016560440883, 28: 0.0032114461064, 30: 0.0013718936825}
        | {32: 0.00052484602202, 34: 0.00017850779113, 36: 7.7846554632e-05}
        | {50: 4.411534519e-06, 63: 3.0689258779e-07},
    ),
    "Qwen3, YaRN": (
        (1_000_000.0, RotaryScaling("yarn", 4.0, 32_768, 1.0, 32.0)),
        {0: 1.0, 20: 0.0133352149278, 25: 0.00413173809648, 28: 0.00184827658813}
        | {32: 0.000602941145189, 36: 0.000179841154022, 40: 4.44569850515e-05}
        | {50: 5.13381246492e-06, 63: 3.10234440803e-07},
    ),
    "linear": (
        (10_000.0, RotaryScaling("linear", 4.0)),
        {0: 0.25, 20: 0.0140585321933, 63: 2.88695482595e-05},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_for_longer_contexts(name):
    (theta, scaling), expected = PUBLISHED[name]
    frequencies = rotary_frequencies(128, theta, scaling)
    assert frequencies.dtype == np.float64
    for index, value in expected.items():
        assert frequencies[index] == pytest.approx(value, rel=1e-6), index


def test_only_yarn_changes_amplitudes():
    assert rotary_amplitude(RotaryScaling("llama3", 8.0, 8192)) == 1.0
    yarn = RotaryScaling("yarn", 4.0, 32_768, 1.0, 32.0)
    assert rotary_amplitude(yarn) == pytest.approx(1.138629436111989, rel=1e-15)
    own = RotaryScaling("yarn", 4.0, 32_768, 1.0, 32.0, 1.5)
    x, positions = jnp.float32(make_normal(0, 1, 3, 2, 4)), jnp.arange(3)[None]
    rotated = rotate(x, positions, 100.0, own)
    assert_close(jnp.sum(rotated**2), 2.25 * jnp.sum(x**2), rel_rms=1e-6)
    plain = rotate(x, positions, 100.0, RotaryScaling("linear", 4.0))
    assert_close(jnp.sum(plain**2), jnp.sum(x**2), rel_rms=1e-6)


def test_angles_are_exact_at_any_position():
    frequencies = rotary_frequencies(64, 10_000.0)
    angles = jax.jit(lambda p: position_angles(p, frequencies))(jnp.asarray(POSITIONS, jnp.int32))
    assert angles.dtype == jnp.float32
    error = np.asarray(angles, np.float64) - POSITIONS[:, None] * frequencies
    error = np.remainder(error + math.pi, 2 * math.pi) - math.pi
    assert np.abs(error).max() < ANGLE_TOLERANCE
    with jax.enable_x64(True):
        exact = position_angles(jnp.asarray(POSITIONS, jnp.int32), frequencies, jnp.float64)
        assert_close(exact, POSITIONS[:, None] * frequencies, rel_rms=1e-15)


def test_rotation_by_definition():
    x, theta = make_normal(0, 1, 3, 2, 4), 100.0
    actual = rotate(jnp.float32(x), jnp.array([[0, 1, 7]], jnp.int32), theta)
    for row, position in enumerate([0, 1, 7]):
        for pair, frequency in enumerate([1.0, 0.1]):
            turn = np.exp(1j * position * frequency)
            z = (x[0, row, :, pair] + 1j * x[0, row, :, pair + 2]) * turn
            assert_close(actual[0, row, :, pair], z.real, rel_rms=1e-6)
            assert_close(actual[0, row, :, pair + 2], z.imag, rel_rms=1e-6)


@pytest.mark.parametrize("start", [1000, 5_000_000, 2**31 - 4])
def test_scores_depend_on_differences_only(start):
    q, k = (jnp.float32(make_normal(i, 1, 1, 2, 16)) for i in range(2))

    @jax.jit
    def score(query_position, key_position):
        def at(x, position):
            return rotate(x, jnp.full((1, 1), position), 10_000.0)

        return jnp.sum(at(q, query_position) * at(k, key_position), axis=-1)

    near, far = score(3, 0), score(start + 3, start)
    assert_close(far, near, rel_rms=3e-4)
    assert np.abs(score(5, 0) - near).max() > 0.1  # the distance does matter


def test_rotation_keeps_dtype_and_norm():
    x = jnp.asarray(make_normal(0, 2, 5, 2, 8), jnp.bfloat16)
    y = rotate(x, jnp.arange(5, dtype=jnp.int32)[None], 10_000.0)
    assert y.dtype == jnp.bfloat16
    norms = [np.linalg.norm(np.asarray(z, np.float64), axis=-1) for z in (x, y)]
    assert_close(norms[1], norms[0], rel_rms=5e-3)


def test_odd_width():
    with pytest.raises(ValueError, match="even key width: got 5; set config.model.d_key"):
        rotate(jnp.zeros((1, 2, 1, 5)), jnp.zeros((1, 2), jnp.int32), 10_000.0)


def test_sinusoid():
    positions = np.array([[0, 1, 100], [7, 5_000_000, 2**31 - 1]])
    angles = positions[..., None] * 10_000.0 ** (-np.arange(0, 8, 2) / 8)
    actual = sinusoid(jnp.asarray(positions, jnp.int32), 8)
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
    assert_close(actual, expected, rel_rms=ANGLE_TOLERANCE, max_abs=ANGLE_TOLERANCE)


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 1024), (8, 128), (7, 20)])
def test_relative_bucket(n_buckets, max_distance):
    distance = np.arange(-5, 2 * max_distance)
    bucket = np.asarray(relative_bucket(jnp.asarray(distance), n_buckets, max_distance))
    exact = n_buckets // 2
    assert np.all(bucket[distance <= 0] == 0)
    small = (distance >= 0) & (distance < exact)
    assert np.array_equal(bucket[small], distance[small])
    assert np.all(np.diff(bucket) >= 0) and np.all(np.diff(bucket) <= 1)
    assert np.all(bucket[distance >= max_distance] == n_buckets - 1)
    large = distance >= exact
    share = np.log(distance[large] / exact) / np.log(max_distance / exact)
    real = np.minimum(exact + share * (n_buckets - exact), n_buckets - 1)
    assert np.abs(bucket[large] - np.floor(real)).max() <= 1
    off_edge = np.abs(real - np.round(real)) > 1e-4
    assert np.array_equal(bucket[large][off_edge], np.floor(real)[off_edge])


def test_distance_bias():
    table, distance = np.arange(12.0).reshape(2, 6), jnp.array([[-1, 0, 4, 5, 6, 90]])
    slopes = jnp.asarray(alibi_slopes(2), jnp.float32)
    near = distance_bias(DistanceBias(jnp.asarray(table), 0), distance)
    assert np.array_equal(near[1, 0], [6, 6, 10, 11, 0, 0])  # beyond the table: nothing
    bucketed = distance_bias(DistanceBias(jnp.asarray(table), 10), distance)
    assert np.array_equal(bucketed[0, 0], table[0][np.asarray(relative_bucket(distance[0], 6, 10))])
    both = distance_bias(DistanceBias(jnp.asarray(table), 0, slopes), distance)
    assert_close(both - near, -slopes[:, None, None] * np.maximum(distance, 0), rel_rms=1e-6)
    assert_close(alibi_slopes(8), 2.0 ** -np.arange(1.0, 9.0), rel_rms=1e-15)
