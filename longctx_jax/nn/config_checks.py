"""What the fields of `config.model` are checked with: errors that name field, value and remedy."""

import dataclasses
import math
from numbers import Integral, Real
from typing import Any

# type of a field -> what it may hold, and how a message says so
_KINDS: dict[Any, tuple[Any, str]] = {
    int: (Integral, "an integer: got {}; write a whole number below 2**31"),
    float: (Real, "a finite number: got {}; write a number"),
    str: (str, "text: got {}; write a name"),
    bool: (bool, "true or false: got {}; write one of them"),
}
_LIMITS: dict[Any, float] = {Integral: 2**31 - 1, Real: 1e300}


def require_types(config: Any, prefix: str = "") -> None:
    """Raises ValueError unless the plain fields of config.model.<prefix> hold what they should."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type not in _KINDS:
            continue
        kind, rule = _KINDS[field.type]
        is_right = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
        if is_right and kind in _LIMITS:
            is_right = abs(value) <= _LIMITS[kind]
        if not is_right:
            shown = rule.format(f"{value!r:.100}")
            raise ValueError(f"config.model.{prefix}{field.name} must be {shown}")


def require_one_of(field: str, value: str | int, allowed: tuple[str | int, ...]) -> None:
    """Raises ValueError unless config.model.<field> is one of the allowed values."""
    if value not in allowed:
        raise ValueError(
            f"config.model.{field} must be one of {list(allowed)}: got {value!r}; "
            "choose one of them"
        )


def require_positive(field: str, value: float) -> None:
    """Raises ValueError unless config.model.<field> > 0."""
    if not value > 0:
        raise ValueError(f"config.model.{field} must be positive: got {value}; set it above 0")


def require_not_negative(field: str, value: float) -> None:
    """Raises ValueError unless config.model.<field> >= 0."""
    if value < 0:
        raise ValueError(
            f"config.model.{field} must not be negative: got {value}; 0 means off or derived"
        )


def require_probability(field: str, value: float) -> None:
    """Raises ValueError unless 0 <= config.model.<field> < 1."""
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"config.model.{field} must be in [0, 1): got {value}; it is a probability"
        )


def nearest_divisor(number: int, wanted: int) -> int:
    """Returns the divisor of `number` closest to `wanted` (the smaller one of two)."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    return min(divisors, key=lambda d: (abs(d - wanted), d))
