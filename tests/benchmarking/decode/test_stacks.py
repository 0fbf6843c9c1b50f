"""The part "stacks" of the suite decode: what is counted, and what its rows say."""

import numpy as np
import pytest

from longctx_jax.benchmarking import decode
from longctx_jax.benchmarking.decode import stacks
from longctx_jax.benchmarking.decode.panels import panels
from longctx_jax.benchmarking.rows import flat, within
from longctx_jax.benchmarking.timing import Limits
from longctx_jax.figures.panels import draw_groups


@pytest.fixture(scope="module")
def models():
    return stacks.make_models(stacks.SMALL, "float32")


def test_weights_are_read_once_by_lanes_and_again_by_passes_in_turn(models):
    d, layers = 16, 4
    block = 4 * d * d + 3 * d * 32 + 2 * d
    cross = 4 * d * d + d
    rest = 256 * d + d  # tied embedding, last norm
    border = 2 * d  # first slot and norm
    expected = {
        "dense": layers * block + rest,
        "dense, half as deep": layers // 2 * block + rest,
        "separate": layers * block + rest + border + layers // 2 * cross,
        "separate, window 1": layers * block + rest + border + layers // 2 * d * d,
        "shared": layers // 2 * (block + cross) + rest + border,
        "shared, recurrent": layers // 2 * (block + cross) + rest + border,
        "shared, in turns": layers // 2 * (2 * block + cross) + rest + border,
        "loop": layers * block + rest + d,
    }
    for name, n in expected.items():
        assert stacks.weight_bytes(models[name]) == 4 * n, name


@pytest.mark.slow
def test_rows_of_every_variant_and_their_ratios():
    limits = Limits(n_runs=2, n_warmup=0, is_quick=True)
    rows = list(map(flat, within(stacks.stack_rows(limits, {}), part="stacks")))
    names = ["dense", "dense, half as deep", *stacks.VARIANTS]
    for batch_size in (1, 2):
        own = [row for row in rows if row["batch_size"] == batch_size]
        timed = [row for row in own if "median_ms" in row]
        assert [row["variant"] for row in timed] == names
        assert all(row["token_ms"] > 0 and row["floor_ms"] > 0 for row in timed)
        ratios = [row for row in own if "speed_ratio" in row]
        assert len(ratios) == 2 * len(names) - 2
    device = {"device": "cpu", "jax_version": "0", "date": "2026", "revision": "0"}
    axes = draw_groups(panels(rows), [row | device for row in rows]).axes
    assert [axis.get_title().split(", ")[0] for axis in axes] == ["1 row", "2 rows"]


def test_a_ratio_is_told_as_a_saving():
    row = {
        "variant": "shared",
        "baseline": "dense",
        "pass": "loop",
        "batch_size": 1,
        "context_len": 1024,
    }
    row |= dict.fromkeys(("speed_ratio_quartile_1", "speed_ratio_quartile_3"), 1.5)
    text = decode.SUITE.summary(row | {"speed_ratio": 1.5})
    assert "33 % less time" in text and np.isclose(1 - 1 / 1.5, 1 / 3)
