"""Shapes that signatures name are checked at every call: nothing is broadcast by accident.

A state of one row for many, a history of another width or a reset of another length would else be
broadcast by the arithmetic, or shift time, and give numbers. Shapes are known when tracing, so in a
compiled program this costs nothing.
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jaxtyping
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])
COUNTED = ("batch", "seq")  # dimensions of which there must be at least one


def checked(function: F) -> F:
    """Returns the function with the shapes in its signature checked before it runs.

    A `state` that is a tree of arrays is checked for rows: their first dimension is `batch`, if the
    signature names one.

    Raises (when called):
        ValueError: naming the argument, what the signature says and the shape that was given.
    """
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function)
    shapes = {name: _alternatives(hints.get(name)) for name in signature.parameters}
    shapes = {name: found for name, found in shapes.items() if found}

    @functools.wraps(function)
    def call(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        rows = None
        with jaxtyping.jaxtyped("context"):
            for name, value in given.items():
                if value is None:
                    continue
                if name in shapes:
                    _require(function.__name__, name, value, shapes[name])
                    rows = _rows(value, shapes[name]) if rows is None else rows
                elif rows is not None and name == "state":
                    _require_rows(function.__name__, name, value, rows)
        return function(*args, **kwargs)

    return typing.cast(F, call)


def _alternatives(hint: Any) -> tuple[tuple[Any, str], ...]:
    """Returns (a check of shapes alone, names of the dimensions) of each array type in a hint."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return tuple(pair for part in typing.get_args(hint) for pair in _alternatives(part))
    dims = getattr(hint, "dim_str", None)
    return () if dims is None else ((jaxtyping.Shaped[Any, dims], dims.strip()),)


@typing.no_type_check  # the tests' type checker would give it dimensions of its own
def _require(op: str, name: str, value: Any, allowed: tuple[tuple[Any, str], ...]) -> None:
    shape = np.shape(value)
    array = jax.ShapeDtypeStruct(shape, getattr(value, "dtype", np.float32))
    names = " or ".join(f"[{', '.join(dims.split())}]" for _, dims in allowed)
    if not any(isinstance(array, check) for check, _ in allowed):
        raise ValueError(
            f"{op}: {name} must be {names}, sizes as in the arguments before it: got {shape}; "
            "nothing is broadcast"
        )
    for _, dims in allowed:
        for dimension, size in zip(dims.split(), shape, strict=False):
            if dimension.startswith("*"):
                break
            if dimension in COUNTED and size == 0:
                raise ValueError(
                    f"{op}: {name} must be {names} with at least one row and one token: got shape "
                    f"{shape}; skip empty calls"
                )


def _rows(value: Any, allowed: tuple[tuple[Any, str], ...]) -> int | None:
    """Returns the size of `batch` where it is the first dimension."""
    is_first = any(dims.split()[:1] == ["batch"] for _, dims in allowed)
    return np.shape(value)[0] if is_first else None


def _require_rows(op: str, name: str, tree: Any, rows: int) -> None:
    for leaf in jax.tree.leaves(tree):
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != rows:
            raise ValueError(
                f"{op}: {name} must have the {rows} rows of the arguments before it: got an array "
                f"of shape {np.shape(leaf)}; nothing is broadcast"
            )
