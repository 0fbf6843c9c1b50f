"""The suite `train`: its choices, without timing anything."""

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from longctx_jax.benchmarking import model_cases, train
from longctx_jax.benchmarking.rows import flat
from longctx_jax.benchmarking.suite import Request
from longctx_jax.benchmarking.timing import Limits
from longctx_jax.benchmarking.train import parts, saves
from longctx_jax.benchmarking.train.panels import panels
from longctx_jax.figures.panels import draw_groups
from longctx_jax.models.schedules.diagonal import diagonal_cells

QUICK = Limits(n_runs=1, n_warmup=0, is_quick=True)


@pytest.fixture
def config():
    return base.get_config()


def measure(config, limits, *names):
    """The flat rows of parts of the suite."""
    request = Request(config, limits, names or train.SUITE.parts)
    return list(map(flat, train.SUITE.rows(request)))


def test_yardstick_and_models_share_their_rounds(config, without_clock):
    rows = measure(config, QUICK, "models")
    (cases,) = without_clock
    assert {parts.YARDSTICK, "transformer", "transformer, carried cache", "decay"} <= cases.keys()
    assert {row["part"] for row in rows} == {"models"}
    ratio = next(row for row in rows if row["name"] == "ratio transformer / yardstick")
    assert ratio["speed_ratio"] == 0.5  # twice the time is half the speed
    row = next(row for row in rows if row["name"] == "transformer")
    assert row["tokens_per_s"] == 2 * 32 / 2e-3
    assert row["model_flops_per_s"] == row["tokens_per_s"] * row["model_flops_per_token"]


@pytest.mark.parametrize(
    "path, value",
    [
        ("model.n_kv_heads", 1),
        ("model.mlp", "gelu"),
        ("model.tie_embeddings", False),
        ("model.softmax.qk_norm", True),
        ("optim.name", "lion"),
    ],
)
def test_another_model_than_the_yardstick_gets_no_ratio(config, path, value, without_clock):
    config.update_from_flattened_dict({path: value})
    rows = measure(config, QUICK, "models")
    assert parts.YARDSTICK not in without_clock[0]
    assert path in rows[-1]["skipped"] and not any("speed_ratio" in row for row in rows)


def test_default_config_is_the_yardstick(config):
    limits = Limits()
    assert parts.yardstick_differs(config, model_cases.base_model(config, limits)) == []
    assert parts.pattern_for(6) == ("decay", "decay", "sliding")
    assert parts.pattern_for(4) == ("decay", "sliding") and parts.pattern_for(5) == ()


def test_lengths_keep_the_tokens_of_a_step(config, without_clock):
    rows = measure(config, Limits(lengths=(128, 1024)), "lengths")
    assert {row["batch_size"] * row["seq_len"] for row in rows} == {16 * 256}
    assert {row["name"] for row in rows} == {"softmax", "sliding", "decay"}


def test_schedules_report_the_cells_they_evaluate(config, without_clock):
    rows = measure(config, Limits(), "schedules")
    cells = {row["name"]: row["cells"] for row in rows if row["pass"] == "train"}
    assert cells["sequential"] == cells["layerwise"] == 8 * 16
    assert cells["diagonal, 4 ramp buckets"] == diagonal_cells(16, 8, 1, 4)
    widths = [cells[f"diagonal, {n} ramp buckets"] for n in (1, 2, 4)]
    assert sorted(widths, reverse=True) == widths and widths[-1] > 8 * 16
    assert {row["padded_cells"] for row in rows} == {(8 + 16 - 1) * 8}


def test_the_figure_has_a_panel_a_part(config, without_clock):
    rows = measure(config, QUICK, "models", "lengths", "schedules")
    figure = draw_groups(panels(rows), rows)
    assert len(figure.axes) == 3
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[:2] == ["yardstick", "transformer"]
    assert "cells)" in figure.axes[2].get_yticklabels()[0].get_text()


def test_train_case_continues_from_its_state(config):
    model = model_cases.variant(model_cases.base_model(config, QUICK), ("decay",))
    case = model_cases.train_case(config, model, 2, 8, cache_len=8)
    state, batch = case.make_inputs(None)
    assert set(batch) == {"tokens", "targets", "weights", "segment_ids"}
    assert batch["tokens"].shape == (2, 8) and int(batch["tokens"].max()) < 256
    again = case.make_inputs((state, {}))
    assert again[0] is state and not np.array_equal(again[1]["tokens"], batch["tokens"])


def test_random_batches_have_documents_that_only_grow():
    batch = model_cases.make_batch(np.random.default_rng(0), 3, 20_000, 7)
    steps = jnp.diff(batch["segment_ids"], axis=1)
    assert int(steps.min()) == 0 and int(steps.sum()) > 0
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


@pytest.mark.slow
def test_a_save_has_a_price(config):
    config.train.checkpoint_every = 10
    (row,) = map(flat, saves.saves_part(config, QUICK))
    assert row["checkpoint_every"] == 10
    assert row["save_wait_ms"] > 0 and row["compile_s"] > 0
    price_s = max(row["save_extra_ms"], row["save_wait_ms"])
    interval_s = 10 * row["median_ms"]
    np.testing.assert_allclose(row["overhead_fraction"], price_s / interval_s, rtol=0.01, atol=1e-5)
