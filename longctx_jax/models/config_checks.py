"""What the fields of `config.model` are checked with: errors that name field, value and remedy."""

import dataclasses
from numbers import Integral
from typing import Any


def require_integers(config: Any, prefix: str = "") -> None:
    """Raises ValueError unless the int fields of config.model.<prefix> hold integers."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is int and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise ValueError(
                f"config.model.{prefix}{field.name} must be an integer: got {value!r}; "
                "write a whole number"
            )


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
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
