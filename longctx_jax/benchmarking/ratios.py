"""Ratios of measured times, and their quartiles: the only place that computes them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from longctx_jax.benchmarking.rows import Fields

QUARTILES = ("_quartile_1", "", "_quartile_3")
SPEED = "speed_ratio"


def quartiles(name: str, values: np.ndarray, digits: int = 4) -> Fields:
    """Returns the median of values as `name`, and `name`_quartile_1 and _3."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {
        name: round(float(median), digits),
        f"{name}_quartile_1": round(float(low), digits),
        f"{name}_quartile_3": round(float(high), digits),
    }


def speed_ratio(ours: np.ndarray, theirs: np.ndarray) -> Fields:
    """Returns how many times as fast we are, run by run of the same rounds; {} without runs.

    Args:
        ours: seconds of every run.
        theirs: the same of what is compared, in turns with ours. Of a single run (a time that was
            not measured in turns) ours are all compared with it.
    """
    n = min(len(ours), len(theirs))
    if not n:
        return {}
    ratio = theirs[:n] / ours[:n] if n > 1 else np.median(theirs) / ours
    return {"n_runs": n} | quartiles(SPEED, ratio)


def speed_ratio_of_rows(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Fields:
    """Returns the ratio of two rows' medians, and of their shortest runs.

    Their runs are not of the same rounds, so the quartiles are the worst and the best pair.
    """

    def ratio(above: str, below: str) -> float:
        return round(theirs[above] / max(ours[below], 1e-9), 4)

    return {
        SPEED: ratio("median_ms", "median_ms"),
        f"{SPEED}_of_minima": ratio("min_ms", "min_ms"),
        f"{SPEED}_quartile_1": ratio("quartile_1_ms", "quartile_3_ms"),
        f"{SPEED}_quartile_3": ratio("quartile_3_ms", "quartile_1_ms"),
    }


def text(row: Mapping[str, Any], name: str = SPEED, digits: int = 3) -> str:
    """Returns `1.310 (quartiles 1.250 to 1.420)`."""
    low, median, high = (row[f"{name}{ending}"] for ending in QUARTILES)
    return f"{median:.{digits}f} (quartiles {low:.{digits}f} to {high:.{digits}f})"
