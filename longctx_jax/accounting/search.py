"""Inverse questions to memory by formula: what fits into so many bytes.

largest_context   how long may a stream be, for a model of a given size
largest_models    how deep, or how wide, may a model be that has no more than another one
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from longctx_jax.accounting.caches import cache_bytes
from longctx_jax.accounting.programs import parameter_bytes, parameter_count, predicted
from longctx_jax.models import build_model
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.decoder import Decoder

MAX_CONTEXT = 2**31 - 1  # positions are int32
WIDTHS = ("d_key", "d_value", "d_ff")  # beside d_model, all in proportion


def held_bytes(
    model: Decoder, context_len: int, *, batch_size: int, weight_dtype: str, program: str = ""
) -> int:
    """Returns parameters and cache, or the peak of one of `programs.PROGRAMS`."""
    if program:
        sizes = {"batch_size": batch_size, "max_len": context_len, "weight_dtype": weight_dtype}
        return predicted(model, program, **sizes)[0]["peak"]
    cache = cache_bytes(model, batch_size, context_len)
    return parameter_bytes(model, weight_dtype) + cache


def largest_context(held: Callable[[int], int], budget: int) -> int:
    """Returns the most tokens for which held(tokens), which never falls, is at most the budget.

    0 = not even one; `MAX_CONTEXT` = any.
    """
    if held(MAX_CONTEXT) <= budget:
        return MAX_CONTEXT
    return largest(lambda n: held(n) <= budget)


def largest(fits: Callable[[int], bool], guess: int = 1) -> int:
    """Returns the largest n that fits, where all smaller ones do and not all larger; 0 does.

    Walks from the guess in steps that double, then halves what is left: few tests if it is near.
    """
    step = 1
    low = high = max(1, guess)
    if fits(low):
        while fits(high := low + step):
            low, step = high, 2 * step
    else:
        while (low := max(0, high - step)) and not fits(low):
            high, step = low, 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclasses.dataclass(frozen=True)
class Fit:
    """The largest model of a scheme within a budget; zeros if none is."""

    n_layers: int
    d_model: int
    n_parameters: int
    held_bytes: int


def largest_models(
    config: ModelConfig, budget: int, *, context_len: int, batch_size: int, weight_dtype: str
) -> dict[str, Fit]:
    """Returns the deepest and the widest model like `config` that holds at most budget bytes.

    Parameters and cache count, at the context. "deep" changes n_layers alone, in steps of the
    pattern (times stacks); "wide" changes d_model and, in proportion, the widths of heads and of
    the MLP, in steps that keep head widths even.
    """

    def held(model: Decoder) -> int:
        sizes = {"batch_size": batch_size, "weight_dtype": weight_dtype}
        return held_bytes(model, context_len, **sizes)

    def fit(scaled: Callable[[int], ModelConfig], unit: int) -> Fit:
        def held_by(n: int) -> int:
            return held(build_model(scaled(n)))

        guess = near_root([(n, held_by(n) - budget) for n in (unit, 2 * unit, 3 * unit)])
        n = largest(lambda n: held_by(n) <= budget, guess)
        if not n:
            return Fit(0, 0, 0, 0)
        model = build_model(scaled(n))
        sizes = model.config.n_layers, model.config.d_model
        return Fit(*sizes, parameter_count(model), held(model))

    unit = len(config.pattern)
    if config.name == "stagformer":
        unit *= config.stagformer.n_stacks

    def deeper(n: int) -> ModelConfig:
        return dataclasses.replace(config, n_layers=n * unit)

    step = width_step(config)
    return {
        "deep": fit(deeper, 1),
        "wide": fit(lambda n: scaled_width(config, n, step), step),
    }


def near_root(points: list[tuple[int, int]]) -> int:
    """Returns about where the parabola through three points, which rises, crosses zero; 1 at least.

    Bytes are a polynomial of depth (of degree 1) and of width (of degree 2) but for rounding.
    """
    x, y = (np.asarray(values, np.float64) for values in zip(*points, strict=True))
    a, b, c = np.polyfit(x, y, 2)
    if abs(a) * x[-1] < 1e-9 * abs(b):
        return max(1, int(-c / b))
    root = (-b + math.sqrt(max(0.0, b * b - 4 * a * c))) / (2 * a)
    return max(1, int(root))


def width_step(config: ModelConfig) -> int:
    """Returns n: d_model grows in steps of d_model / n, with key and value widths that stay even.

    Raises:
        ValueError: if the smallest such step breaks a rule of the config, as its error says.
    """
    n = math.gcd(config.d_model, config.d_key, config.d_value)
    n = n // 2 if n % 2 == 0 else n
    while n > 1:
        try:
            build_model(scaled_width(config, n + 1, n))
            return n
        except ValueError:  # e.g. heads of a fixed width that no longer divide d_model
            n = n // 2 if n % 2 == 0 else 1
    return 1


def scaled_width(config: ModelConfig, n: int, step: int) -> ModelConfig:
    """Returns the config n / step times as wide; an MLP's width is rounded up to 32."""
    sizes = {name: getattr(config, name) * n // step for name in WIDTHS}
    sizes["d_ff"] = -(-sizes["d_ff"] // 32) * 32
    return dataclasses.replace(config, d_model=config.d_model * n // step, **sizes)
