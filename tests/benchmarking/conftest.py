"""Suites without a clock."""

import numpy as np
import pytest

from longctx_jax.benchmarking.timing import Limits
from longctx_jax.benchmarking.train.parts import YARDSTICK


@pytest.fixture
def without_clock(monkeypatch):
    """Suites yield their rows without compiling or running; the cases land in the list."""
    seen = []

    def measure(limits, cases):
        seen.append(cases)
        row = {"median_ms": 2.0, "quartile_1_ms": 1.0, "quartile_3_ms": 3.0}
        times = {name: np.array([2.0 if name == YARDSTICK else 4.0]) for name in cases}
        return {name: (dict(row), times[name]) for name in cases}

    monkeypatch.setattr(Limits, "measure", measure)
    return seen
