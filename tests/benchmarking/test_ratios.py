"""Ratios and their quartiles."""

import numpy as np
import pytest

from longctx_jax.benchmarking import ratios


def test_a_ratio_is_of_runs_of_one_round():
    ours, theirs = np.array([1.0, 2.0, 1.0]), np.array([3.0, 6.0, 5.0, 100.0])
    found = ratios.speed_ratio(ours, theirs)
    assert found == {
        "n_runs": 3,
        "speed_ratio": 3.0,
        "speed_ratio_quartile_1": 3.0,
        "speed_ratio_quartile_3": 4.0,
    }
    assert ratios.text(found) == "3.000 (quartiles 3.000 to 4.000)"
    assert ratios.speed_ratio(ours, np.zeros(0)) == {}


def test_a_single_time_is_compared_with_all_runs():
    found = ratios.speed_ratio(np.array([1.0, 2.0]), np.array([0.75]))
    assert found["speed_ratio"] == pytest.approx(0.5625)


def test_rows_of_other_rounds_have_the_worst_and_the_best_quartiles():
    ours = {"median_ms": 1.0, "min_ms": 0.5, "quartile_1_ms": 1.0, "quartile_3_ms": 2.0}
    theirs = {"median_ms": 6.0, "min_ms": 3.0, "quartile_1_ms": 6.0, "quartile_3_ms": 12.0}
    found = ratios.speed_ratio_of_rows(ours, theirs)
    assert found["speed_ratio"] == 6.0 == found["speed_ratio_of_minima"]
    assert (found["speed_ratio_quartile_1"], found["speed_ratio_quartile_3"]) == (3.0, 12.0)
