"""How an op with several implementations chooses one, and says once what it chose and why.

The choice is a pure function of static facts (shapes, dtypes, device kind). A named implementation
that cannot run raises; it never falls back. Nothing is timed here and nothing is read from the
environment.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import logging

_ALREADY_SAID: set[tuple] = set()


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: what a user writes in `implementation=`.
        run: the function.
        unsupported: facts -> "" when it can run, otherwise the reason.
        unattractive: facts -> "" when "auto" may take it, otherwise why it is not worth it.
    """

    name: str
    run: Callable[..., Any]
    unsupported: Callable[[Any], str] = lambda facts: ""
    unattractive: Callable[[Any], str] = lambda facts: ""


def choose(
    op: str, implementations: Sequence[Implementation], requested: str, facts: Any
) -> Implementation:
    """Returns the implementation to run.

    Args:
        op: the op's name, for messages.
        implementations: in order of preference under "auto"; the last must always be able to run.
        requested: "auto" or a name.
        facts: hashable static facts of the call, handed to the capability checks.

    Raises:
        ValueError: if no implementation has the requested name.
        NotImplementedError: if the requested one cannot run, with the reason.
    """
    if requested != "auto":
        for implementation in implementations:
            if implementation.name == requested:
                if reason := implementation.unsupported(facts):
                    raise NotImplementedError(
                        f"{op}: implementation '{requested}' cannot run here: {reason}; "
                        "choose another one or 'auto'"
                    )
                return implementation
        names = ["auto", *(i.name for i in implementations)]
        raise ValueError(f"{op}: implementation must be one of {names}: got '{requested}'")

    passed_over = []
    for implementation in implementations:
        reason = implementation.unsupported(facts) or implementation.unattractive(facts)
        if not reason:
            _say_once(op, implementation.name, passed_over, facts)
            return implementation
        passed_over.append(f"{implementation.name}: {reason}")
    raise AssertionError(f"{op}: no implementation can run: {passed_over}")


def _say_once(op: str, name: str, passed_over: list[str], facts: Any) -> None:
    if (op, name, facts) in _ALREADY_SAID:
        return
    _ALREADY_SAID.add((op, name, facts))
    logging.info("op=%s implementation=%s facts=%s passed_over=%s", op, name, facts, passed_over)


def platform() -> str:
    """Returns the platform a computation traced now will run on: "cpu", "gpu" or "tpu"."""
    return jax.default_backend()


def capability() -> str:
    """Returns the compute capability of the first NVIDIA device, e.g. "9.0"; "" elsewhere."""
    return str(getattr(jax.local_devices()[0], "compute_capability", ""))


def leaf(module: str, function: str) -> Callable[..., Any]:
    """Returns a function of a kernel file under `longctx_jax.ops`, imported when first called."""

    def call(*args, **kwargs):
        return getattr(importlib.import_module(f"longctx_jax.ops.{module}"), function)(
            *args, **kwargs
        )

    return call


def leaf_unsupported(module: str, function: str = "unsupported") -> Callable[[Any], str]:
    """Returns the capability check of a kernel file, which is loaded on a GPU only."""

    def check(facts: Any) -> str:
        if facts.platform != "gpu":
            return f"a GPU kernel, and jax runs on {facts.platform}"
        try:
            return leaf(module, function)(facts)
        except ImportError as error:  # a backend that this jax no longer or not yet has
            return f"this jax cannot load it: {error}"

    return check
