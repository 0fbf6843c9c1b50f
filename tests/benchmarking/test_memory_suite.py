"""The suite `memory`: what it counts, what it compares, and the picture of the schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import llama_armt
from longctx_jax.benchmarking import figures, memory_suite
from longctx_jax.benchmarking.launches import count_launches
from longctx_jax.benchmarking.schedule_figure import IDLE, USEFUL, draw_schedule, step_grid
from longctx_jax.benchmarking.suites import Limits
from longctx_jax.models.schedules.diagonal import diagonal_cells


def launches(function, *inputs):
    return count_launches(jax.jit(function).lower(*inputs).compile())


def test_launches_of_loops_count_as_often_as_they_run():
    x, weights = jnp.ones((64, 64)), jnp.ones((7, 64, 64))

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def segments(x, weights, n):
        return jax.lax.scan(lambda x, _: (layers(x, weights), None), x, None, length=n)[0]

    counts = [launches(lambda x, w, n=n: segments(x, w, n), x, weights) for n in (4, 8, 12)]
    assert counts[2] - counts[1] == counts[1] - counts[0] >= 4 * 7  # a product a layer at least

    def either(x, weights):
        return jax.lax.cond(x[0, 0] > 0, lambda x: segments(x, weights, 8), lambda x: x, x)

    assert counts[1] <= launches(either, x, weights) <= counts[1] + 10


@pytest.mark.parametrize(
    "sizes", [(12, 6, 1, 3), (3, 4, 2, 2), (1, 5, 1, 4), (8, 1, 1, 4)], ids=str
)
def test_picture_shows_every_cell_once_and_what_idles(sizes):
    n_segments, n_repeats, pattern_len, _ = sizes
    grid = step_grid(*sizes)
    assert grid.shape == (n_repeats * pattern_len, n_segments + n_repeats * pattern_len - 1)
    for layer, row in enumerate(grid == USEFUL):
        np.testing.assert_array_equal(np.nonzero(row)[0], layer + np.arange(n_segments))
    assert np.sum(grid == USEFUL) + np.sum(grid == IDLE) == diagonal_cells(*sizes)
    assert draw_schedule(*sizes).axes


@pytest.mark.slow
def test_both_orders_have_one_memory_and_it_is_at_work():
    sizes = memory_suite.setting("cpu", Limits(is_quick=True))
    models = memory_suite.make_models(sizes, memory_suite.SMALL, 8)
    variables = memory_suite.weights_of(models["armt diagonal"])
    assert memory_suite.weights_of(models["armt sequential"]) is variables
    (layer,) = variables["params"]["memory"]["layers"].values()
    assert np.all(np.std(np.asarray(layer["value"]["kernel"]), axis=(1, 2)) > 0.1)


def test_ratios_are_of_one_round():
    times = {"armt diagonal": np.array([1.0, 2.0]), "full attention": np.array([3.0, 6.0])}
    times |= {memory_suite.IDEAL: np.array([0.75]), "armt sequential": np.zeros(0)}
    rows = {row["other"]: row for row in memory_suite._ratios(times, {"seq_len": 8})}
    assert set(rows) == {"full attention", memory_suite.IDEAL}
    assert rows["full attention"]["speed_ratio"] == 3.0
    assert rows[memory_suite.IDEAL]["speed_ratio"] == pytest.approx(0.5625)


def test_sizes_by_platform():
    on_gpu = memory_suite.setting("gpu", Limits(), {"3b": llama_armt.SHAPES["3b"]})
    assert list(on_gpu.shapes) == ["3b"] and on_gpu.dtype == "bfloat16"
    assert on_gpu.lengths[-1] == 131_072 and on_gpu.segment_lens == (512, 1024, 2048, 4096)
    assert memory_suite.setting("cpu", Limits(lengths=(256,))).lengths == (256,)


def test_shapes_are_those_of_llama():
    models = {name: llama_armt.get_config(name).model for name in llama_armt.SHAPES}
    assert {name: model.n_layers for name, model in models.items()} == {
        "160m": 12,
        "1b": 16,
        "3b": 28,
        "8b": 32,
    }
    with pytest.raises(ValueError, match="configs/llama_armt.py:1b"):
        llama_armt.get_config("2b")


@pytest.mark.slow
def test_all_parts_run_and_are_drawn():
    from configs import base

    rows = list(memory_suite.memory_rows(base.get_config(), Limits(n_runs=2, is_quick=True)))
    assert {row["part"] for row in rows} == set(memory_suite.PARTS)
    prefill = {row["name"]: row for row in rows if row.get("pass") == "prefill"}
    assert prefill["armt sequential"]["launches"] > prefill["full attention"]["launches"]
    fields = {"device": "cpu", "date": "2026", "revision": "x"}
    figure = figures.draw_rows([row | fields for row in rows])
    assert len(figure.axes) >= 4
    assert "times as fast" in memory_suite.summary_text(rows[-1])
