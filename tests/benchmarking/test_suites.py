"""The suites' choices, without timing anything; scripts.benchmark itself is run by a slow test."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from longctx_jax.benchmarking import decode_suite, figures, saving_suite, suites
from longctx_jax.decoding import generate
from longctx_jax.decoding.sampling import Sampling
from longctx_jax.models.schedules.diagonal import diagonal_cells

QUICK = suites.Limits(n_runs=1, n_warmup=0, is_quick=True)
QUICK_LOOP = suites.Limits(n_runs=1, is_quick=True, lengths=(8,))


@pytest.fixture
def config():
    return base.get_config()


@pytest.fixture
def without_clock(monkeypatch):
    """Suites yield their rows without compiling or running; the cases land in the list."""
    seen = []

    def measure(limits, cases):
        seen.append(cases)
        row = {"median_ms": 2.0, "quartile_1_ms": 1.0, "quartile_3_ms": 3.0}
        times = {name: np.array([2.0 if name == suites.YARDSTICK else 4.0]) for name in cases}
        return {name: (dict(row), times[name]) for name in cases}

    monkeypatch.setattr(suites.Limits, "measure", measure)
    return seen


def test_yardstick_and_models_share_their_rounds(config, without_clock):
    rows = list(suites.train_rows(config, QUICK, ["models"]))
    (cases,) = without_clock
    assert {suites.YARDSTICK, "transformer", "transformer, carried cache", "decay"} <= cases.keys()
    assert {row["suite"] for row in rows} == {"train"}
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
    rows = list(suites.train_rows(config, QUICK, ["models"]))
    assert suites.YARDSTICK not in without_clock[0]
    assert path in rows[-1]["skipped"] and not any("speed_ratio" in row for row in rows)


def test_default_config_is_the_yardstick(config):
    limits = suites.Limits()
    assert suites.yardstick_differs(config, suites.base_model(config, limits)) == []
    assert suites.pattern_for(6) == ("decay", "decay", "sliding")
    assert suites.pattern_for(4) == ("decay", "sliding") and suites.pattern_for(5) == ()


def test_lengths_keep_the_tokens_of_a_step(config, without_clock):
    rows = list(suites.train_rows(config, suites.Limits(lengths=(128, 1024)), ["lengths"]))
    assert {row["batch_size"] * row["seq_len"] for row in rows} == {16 * 256}
    assert {row["name"] for row in rows} == {"softmax", "sliding", "decay"}


def test_schedules_report_the_cells_they_evaluate(config, without_clock):
    rows = list(suites.train_rows(config, suites.Limits(), ["schedules"]))
    cells = {row["name"]: row["cells"] for row in rows if row["pass"] == "train"}
    assert cells["sequential"] == cells["layerwise"] == 8 * 16
    assert cells["diagonal, 4 ramp buckets"] == diagonal_cells(16, 8, 1, 4)
    widths = [cells[f"diagonal, {n} ramp buckets"] for n in (1, 2, 4)]
    assert sorted(widths, reverse=True) == widths and widths[-1] > 8 * 16
    assert {row["padded_cells"] for row in rows} == {(8 + 16 - 1) * 8}


def test_train_case_continues_from_its_state(config):
    model = suites.variant(suites.base_model(config, QUICK), ("decay",))
    case = suites.train_case(config, model, 2, 8, cache_len=8)
    state, batch = case.make_inputs(None)
    assert set(batch) == {"tokens", "targets", "weights", "segment_ids"}
    assert batch["tokens"].shape == (2, 8) and int(batch["tokens"].max()) < 256
    again = case.make_inputs((state, {}))
    assert again[0] is state and not np.array_equal(again[1]["tokens"], batch["tokens"])


@pytest.mark.slow
def test_prefill_and_loop_draw_what_generate_draws(config, monkeypatch):
    context_len = 11  # two whole pieces and a rest
    monkeypatch.setattr(decode_suite, "PREFILL_LEN", 4)
    model = suites.variant(suites.base_model(config, QUICK), ("softmax",))
    prefill = decode_suite.prefill_case(model, 2, context_len, 5)
    variables, tokens, _ = prefill.make_inputs(None)
    start = prefill.function(variables, tokens, model.init_cache(2, context_len + 5))
    loop = jax.jit(decode_suite.token_loop, static_argnums=(0, 1))
    greedy = Sampling(temperature=0.0)
    expected = generate(
        model, variables, list(np.asarray(tokens)), max_new_tokens=5, sampling=greedy
    )
    np.testing.assert_array_equal(loop(model, 5, variables, *start)[0], expected)


def test_cache_bytes_are_those_of_the_arrays(config):
    model = suites.variant(suites.base_model(config, QUICK), ("softmax",))
    cache = model.init_cache(2, 10)
    assert decode_suite.cache_bytes(model, 2, 10) == sum(x.nbytes for x in jax.tree.leaves(cache))


def test_decode_rows_cover_lengths_batches_and_mixers(config, without_clock):
    rows = list(decode_suite.decode_rows(config, QUICK))
    seen = {(row["pass"], row["pattern"][0], row["context_len"], row["batch_size"]) for row in rows}
    wanted = itertools.product(("prefill", "loop"), decode_suite.KINDS, (16, 32), (1, 8))
    assert seen == set(wanted)
    assert all(row["token_ms"] == 0.5 for row in rows if row["pass"] == "loop")


def test_figures_show_the_newest_row(config, without_clock):
    device = {"device": "cpu", "date": "2026-11-22T00:00:00+00:00"}
    rows = [row | device for row in suites.train_rows(config, QUICK)]
    figure = figures.draw_rows([*rows, rows[0] | {"median_ms": 50.0, "quartile_3_ms": 60.0}])
    assert len(figure.axes) == 3
    assert figure.axes[0].patches[0].get_width() == 50.0
    assert "transformer" in figures.format_table(rows) and "decay" in figures.progress(rows[4])
    decode = [row | device for row in decode_suite.decode_rows(config, QUICK_LOOP)]
    assert [axes.get_xlabel() for axes in figures.draw_rows(decode).axes] == [
        "context (tokens)"
    ] * 3
    with pytest.raises(ValueError, match="rows of one suite"):
        figures.draw_rows(rows + decode)
    with pytest.raises(ValueError, match="rows of one suite"):
        figures.draw_rows([])


def test_random_batches_have_documents_that_only_grow():
    batch = suites.make_batch(np.random.default_rng(0), 3, 20_000, 7)
    steps = jnp.diff(batch["segment_ids"], axis=1)
    assert int(steps.min()) == 0 and int(steps.sum()) > 0
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])


@pytest.mark.slow
def test_a_save_has_a_price(config):
    config.train.checkpoint_every = 10
    (row,) = saving_suite.saving_rows(config, QUICK)
    assert row["part"] == "saves" and row["checkpoint_every"] == 10
    assert row["save_wait_ms"] > 0 and row["compile_s"] > 0
    price_s = max(row["save_extra_ms"], row["save_wait_ms"])
    interval_s = 10 * row["median_ms"]
    np.testing.assert_allclose(row["overhead_fraction"], price_s / interval_s, rtol=0.01, atol=1e-5)
