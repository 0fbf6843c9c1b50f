"""The part "mixers" of the suite decode: what it runs is what generate runs."""

import itertools

import jax
import numpy as np
import pytest

from configs import base
from longctx_jax.accounting.caches import cache_bytes
from longctx_jax.benchmarking import decoding_cases
from longctx_jax.benchmarking.decode import mixers
from longctx_jax.benchmarking.decode.panels import panels
from longctx_jax.benchmarking.model_cases import base_model, variant
from longctx_jax.benchmarking.rows import flat, within
from longctx_jax.benchmarking.timing import Limits
from longctx_jax.decoding import generate
from longctx_jax.decoding import greedy as decoding_greedy
from longctx_jax.decoding.sampling import Sampling
from longctx_jax.figures.panels import draw_groups

QUICK = Limits(n_runs=1, n_warmup=0, is_quick=True)


@pytest.fixture
def config():
    return base.get_config()


@pytest.mark.slow
def test_prefill_and_loop_draw_what_generate_draws(config, monkeypatch):
    context_len = 11  # two whole pieces and a rest
    monkeypatch.setattr(decoding_greedy, "PREFILL_LEN", 4)
    model = variant(base_model(config, QUICK), ("softmax",))
    prefill = decoding_cases.prefill_case(model, 2, context_len, 5)
    variables, tokens, _ = prefill.make_inputs(None)
    start = prefill.function(variables, tokens, model.init_cache(2, context_len + 5))
    loop = jax.jit(decoding_greedy.token_loop, static_argnums=(0, 1))
    greedy = Sampling(temperature=0.0)
    expected = generate(
        model, variables, list(np.asarray(tokens)), max_new_tokens=5, sampling=greedy
    )
    np.testing.assert_array_equal(loop(model, 5, variables, *start)[0], expected)


def test_cache_bytes_are_those_of_the_arrays(config):
    model = variant(base_model(config, QUICK), ("softmax",))
    cache = model.init_cache(2, 10)
    assert cache_bytes(model, 2, 10) == sum(x.nbytes for x in jax.tree.leaves(cache))


def test_decode_rows_cover_lengths_batches_and_mixers(config, without_clock):
    rows = list(map(flat, mixers.mixer_rows(config, QUICK)))
    seen = {(row["pass"], row["pattern"][0], row["context_len"], row["batch_size"]) for row in rows}
    wanted = itertools.product(("prefill", "loop"), mixers.KINDS, (16, 32), (1, 8))
    assert seen == set(wanted)
    assert all(row["token_ms"] == 0.5 for row in rows if row["pass"] == "loop")


def test_the_figure_is_by_context(config, without_clock):
    rows = list(map(flat, within(mixers.mixer_rows(config, QUICK), part="mixers")))
    figure = draw_groups(panels(rows), rows)
    assert [axes.get_xlabel() for axes in figure.axes] == ["context (tokens)"] * 3
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert list(lines["softmax, 8 rows"].get_xdata()) == [16, 32] and len(lines) == 6
