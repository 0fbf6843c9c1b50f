"""Positions: rotary, sinusoid, log-bucketed relative bias, and the relative shift.

Source: Su et al. (2021), Vaswani et al. (2017), Raffel et al. (2020), Dai et al. (2019); rotary
frequencies for longer contexts: Chen et al. (2023), arXiv 2306.15595 (linear); Peng et al. (2023),
arXiv 2309.00071 (YaRN); Grattafiori et al. (2024), arXiv 2407.21783 (llama3).

Streams are endless here, so angles stay exact at any int32 position: `p * frequency` in float32
would lose 0.3 rad at position 5e6. Not here: learned absolute tables (they bound the length).
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.ops.checked import checked
from longctx_jax.typing import Array, DType, Float, Int

_RADIX = 256
_DIGITS = 4  # 256^4 = 2^32: every non-negative int32


ROTARY_SCALINGS = ("none", "linear", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies change for contexts longer than those of pretraining.

    A frequency makes some number of turns within `original_len` tokens. "linear" divides all
    frequencies by `factor`. "llama3" divides those of fewer than `low_turns`, keeps those of more
    than `high_turns`, and goes from one to the other linearly in the turns; "yarn" does so linearly
    in the frequency's index, between whole indices, and multiplies queries and keys by `amplitude`.
    """

    kind: str = "none"
    factor: float = 1.0
    original_len: int = 0  # tokens; unused by "none" and "linear"
    low_turns: float = 1.0
    high_turns: float = 4.0
    amplitude: float = 0.0  # yarn; 0 = 0.1 ln(factor) + 1


UNSCALED = RotaryScaling()


def rotary_frequencies(width: int, theta: float, scaling: RotaryScaling = UNSCALED) -> np.ndarray:
    """Returns theta^(-2i/width) for i < width/2, float64 [width/2], radians a token; scaled."""
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling.kind == "none":
        return frequencies
    kept = np.zeros(len(frequencies))  # share of a frequency that is not divided
    if scaling.kind == "llama3":
        turns = scaling.original_len * frequencies / (2 * math.pi)
        kept = (turns - scaling.low_turns) / (scaling.high_turns - scaling.low_turns)
    elif scaling.kind == "yarn":
        first, last = (
            width * math.log(scaling.original_len / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling.high_turns, scaling.low_turns)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        kept = 1 - (np.arange(len(frequencies)) - first) / max(last - first, 1e-3)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotary_amplitude(scaling: RotaryScaling) -> float:
    """Returns what rotated queries and keys are multiplied by."""
    if scaling.kind != "yarn":
        return 1.0
    return scaling.amplitude or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0


def position_angles(
    positions: Int[Array, "*batch"], frequencies: np.ndarray, dtype: DType = jnp.float32
) -> Float[Array, "*batch frequency"]:
    """Returns position * frequency modulo 2 pi, to about 1e-4 rad at any int32 position.

    A position is written in base 256; each digit's angle unit (256^i frequency mod 2 pi) is a
    constant computed in float64, so no large product is ever rounded.

    Args:
        positions: non-negative token positions.
        frequencies: radians a token, [frequency].
        dtype: of the result; float64 gives the exact product.
    """
    if jnp.dtype(dtype) == jnp.float64:
        return positions.astype(dtype)[..., None] * frequencies
    angles = jnp.zeros((*positions.shape, len(frequencies)), jnp.float32)
    for i in range(_DIGITS):
        digit = (positions // _RADIX**i) % _RADIX
        unit = np.remainder(frequencies * _RADIX**i + math.pi, 2 * math.pi) - math.pi
        units = unit.astype(np.float32).reshape(*[1] * digit.ndim, -1)
        angles += digit.astype(jnp.float32)[..., None] * units
    return angles


@checked
def rotate(
    x: Float[Array, "batch seq heads key"],
    positions: Int[Array, "#batch seq"],
    theta: float,
    scaling: RotaryScaling = UNSCALED,
) -> Float[Array, "batch seq heads key"]:
    """Returns x with the pair (i, i + key/2) rotated by its position's angle.

    Then <rotate(q, t), rotate(k, s)> depends on t - s only.

    Raises:
        ValueError: if the key width is odd.
    """
    width = x.shape[-1]
    if width % 2:
        raise ValueError(
            f"rotary positions need an even key width: got {width}; set config.model.d_key to an "
            "even number or position='none'"
        )
    compute_dtype = jnp.promote_types(x.dtype, jnp.float32)
    angles = position_angles(positions, rotary_frequencies(width, theta, scaling), compute_dtype)
    amplitude = rotary_amplitude(scaling)
    cos, sin = (amplitude * f(angles)[..., None, :] for f in (jnp.cos, jnp.sin))
    left, right = jnp.split(x.astype(compute_dtype), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)


@checked
def sinusoid(
    positions: Int[Array, "batch seq"],
    width: int,
    theta: float = 10_000.0,
    dtype: DType = jnp.float32,
) -> Float[Array, "batch seq model"]:
    """Returns [sin(angles), cos(angles)] in dtype; each half has width/2 frequencies."""
    angles = position_angles(positions, rotary_frequencies(width, theta), dtype)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def relative_bucket(
    distance: Int[Array, "*shape"], n_buckets: int, max_distance: int
) -> Int[Array, "*shape"]:
    """Returns the bucket of a distance query - key >= 0.

    The first half of the buckets holds one distance each; the rest grow geometrically up to
    `max_distance`, beyond which all share the last bucket. Negative distances map to bucket 0.
    """
    exact = n_buckets // 2
    distance = jnp.maximum(distance, 0)
    ratio = jnp.maximum(distance, exact).astype(jnp.float32) / exact
    scale = (n_buckets - exact) / math.log(max_distance / exact)
    logarithmic = exact + (jnp.log(ratio) * scale).astype(jnp.int32)
    return jnp.where(distance < exact, distance, jnp.minimum(logarithmic, n_buckets - 1))


class DistanceBias(NamedTuple):
    """What is added to a score by the distance query - key >= 0; parts that are None add nothing.

    Source: Raffel et al. (2020) for buckets, Press et al. (2022), arXiv 2108.12409 for slopes.
    """

    table: jax.Array | None = None  # [heads, buckets], added by bucket
    # tokens; farther keys share the last bucket (`relative_bucket`). 0: a bucket is one token, and
    # beyond the last one nothing is added
    max_distance: int = 1024
    slopes: jax.Array | None = None  # [heads], times the distance is subtracted


def distance_bias(
    bias: DistanceBias, distance: Int[Array, "*shape"]
) -> Float[Array, "heads *shape"]:
    """Returns the bias of every head at these distances; negative ones count as 0."""
    distance = jnp.maximum(distance, 0)
    total = jnp.zeros((), jnp.float32)
    if bias.table is not None:
        n_buckets = bias.table.shape[1]
        if bias.max_distance:
            total = bias.table[:, relative_bucket(distance, n_buckets, bias.max_distance)]
        else:
            near = bias.table[:, jnp.minimum(distance, n_buckets - 1)]
            total = jnp.where(distance < n_buckets, near, 0.0)
    if bias.slopes is not None:
        slopes = bias.slopes.reshape(-1, *[1] * distance.ndim)
        total = total - slopes * distance.astype(slopes.dtype)
    return total


def alibi_slopes(n_heads: int) -> np.ndarray:
    """Returns 2^(-8 (h + 1) / n_heads) of the heads h, float64.

    Source: Press et al. (2022), arXiv 2108.12409; theirs for powers of two.
    """
    return 2.0 ** (-8.0 * np.arange(1, n_heads + 1) / n_heads)
