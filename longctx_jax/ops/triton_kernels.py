"""What files of Triton kernels share: how kernels are called, which devices they are tiled for."""

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any


def quietly(run: Callable, *args: Any) -> Any:
    """Calls without the deprecation warning of the backend: these files exist knowing it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Triton backend.*deprecated.*")
        return run(*args)


def not_for_hopper(facts: Any, dtypes: Sequence[str]) -> str:
    """Returns why kernels of these dtypes with Hopper's shared memory cannot run, "" if they can.

    Args:
        facts: with platform, dtype, and capability ("" where unknown, e.g. ahead of time).
        dtypes: that the kernels take.
    """
    if facts.platform != "gpu":
        return f"a GPU kernel, and jax runs on {facts.platform}"
    if facts.dtype not in dtypes:
        return f"takes {' or '.join(dtypes)}, not {facts.dtype}"
    if not re.fullmatch(r"(9|10)\.\d|", facts.capability):
        return f"tiled for the 227 KB of compute capability 9 and 10, not {facts.capability}"
    return ""
