"""The suite `memory`: what it counts and what it compares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import llama_armt
from longctx_jax.benchmarking import recurrent_memory
from longctx_jax.benchmarking.launches import count_launches
from longctx_jax.benchmarking.recurrent_memory import parts
from longctx_jax.benchmarking.recurrent_memory.panels import panels
from longctx_jax.benchmarking.rows import flat
from longctx_jax.benchmarking.timing import Limits
from longctx_jax.figures.panels import draw_groups


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


@pytest.mark.slow
def test_both_orders_have_one_memory_and_it_is_at_work():
    sizes = parts.setting("cpu", Limits(is_quick=True))
    models = parts.make_models(sizes, parts.SMALL, 8)
    variables = parts.weights_of(models["armt diagonal"])
    assert parts.weights_of(models["armt sequential"]) is variables
    (layer,) = variables["params"]["memory"]["layers"].values()
    assert np.all(np.std(np.asarray(layer["value"]["kernel"]), axis=(1, 2)) > 0.1)


def test_ratios_are_of_one_round():
    times = {"armt diagonal": np.array([1.0, 2.0]), "full attention": np.array([3.0, 6.0])}
    times |= {parts.IDEAL: np.array([0.75]), "armt sequential": np.zeros(0)}
    found = map(flat, parts._ratios(times, {"seq_len": 8}))
    rows = {row["other"]: row for row in found}
    assert set(rows) == {"full attention", parts.IDEAL}
    assert rows["full attention"]["speed_ratio"] == 3.0
    assert rows[parts.IDEAL]["speed_ratio"] == pytest.approx(0.5625)


def test_sizes_by_platform():
    on_gpu = parts.setting("gpu", Limits(), {"3b": llama_armt.SHAPES["3b"]})
    assert list(on_gpu.shapes) == ["3b"] and on_gpu.dtype == "bfloat16"
    assert on_gpu.lengths[-1] == 131_072 and on_gpu.segment_lens == (512, 1024, 2048, 4096)
    assert parts.setting("cpu", Limits(lengths=(256,))).lengths == (256,)


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

    limits, suite = Limits(n_runs=2, is_quick=True), recurrent_memory.SUITE
    measured = parts.memory_rows(base.get_config(), limits, suite.parts)
    rows = list(map(flat, measured))
    assert {row["part"] for row in rows} == set(suite.parts)
    prefill = {row["name"]: row for row in rows if row.get("pass") == "prefill"}
    assert prefill["armt sequential"]["launches"] > prefill["full attention"]["launches"]
    fields = {"device": "cpu", "date": "2026", "revision": "x"}
    figure = draw_groups(panels(rows), [row | fields for row in rows])
    assert len(figure.axes) >= 4
    assert "times as fast" in suite.summary(rows[-1])
