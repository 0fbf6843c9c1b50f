"""Sweeps are values: lists of overrides, each a dict from a dotted config field to its value.

`vary` makes a list, the others combine lists; a sweep file returns the result from `get_sweep()`.
"""

import functools
import itertools
from typing import Any

Override = dict[str, Any]
Sweep = list[Override]


def vary(field: str, *values: Any) -> Sweep:
    """One override a value: `vary("optim.learning_rate", 1e-3, 3e-4)`."""
    return [{field: value} for value in values]


def product(*sweeps: Sweep) -> Sweep:
    """Every combination of one override from each sweep; the last one varies fastest.

    Raises:
        ValueError: if two of them set the same field.
    """
    return [_merge(combination) for combination in itertools.product(*sweeps)]


def zipped(*sweeps: Sweep) -> Sweep:
    """The first overrides of all sweeps together, then the second, and so on.

    Raises:
        ValueError: if the sweeps differ in length or two of them set the same field.
    """
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"zipped sweeps must have one length: got {lengths}; "
            "give each the same number of values, or use product"
        )
    return [_merge(combination) for combination in zip(*sweeps, strict=True)]


def chain(*sweeps: Sweep) -> Sweep:
    """All overrides of the first sweep, then all of the second, and so on."""
    return [override for sweep in sweeps for override in sweep]


def _merge(overrides: tuple[Override, ...]) -> Override:
    """The union of `overrides`, whose fields must be distinct."""
    merged = functools.reduce(dict.__or__, overrides, {})
    if len(merged) < sum(map(len, overrides)):
        fields = [field for override in overrides for field in override]
        twice = sorted({field for field in fields if fields.count(field) > 1})
        raise ValueError(
            f"combined sweeps must set distinct fields: got {', '.join(twice)} twice; "
            "put all values of a field in one vary(), or use chain"
        )
    return merged
