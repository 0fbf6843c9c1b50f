"""The part "initial" of the suite decode: what is counted, and what its rows say."""

import jax
import numpy as np
import pytest

from longctx_jax.benchmarking.decode import initial
from longctx_jax.benchmarking.decode.panels import panels
from longctx_jax.benchmarking.rows import flat, within
from longctx_jax.benchmarking.timing import Limits
from longctx_jax.figures.panels import draw_groups
from longctx_jax.models.inattention.cache import choose_cache


@pytest.fixture(scope="module")
def models():
    return initial.make_models(initial.SMALL, "float32")


def test_every_variant_has_the_cache_it_names(models):
    caches = {
        name: choose_cache(model.config, 64)
        for name, model in models.items()
        if model.config.name == "inattention"
    }
    assert list(caches.values()) == [
        "kv", "embedding", "embedding", "ids", "ids", "counts", "counts"
    ]  # fmt: skip
    assert models["embeddings, narrow"].config.inattention.d_memory == 4


def test_what_a_token_must_read(models):
    """Two layers of width 16: keys and values each their own, the memory twice."""
    n = 10
    place = 4 * 4  # of the stream: position, start, document, segment id
    assert initial.read_bytes(models["embeddings"], n) == 2 * (4 * 16 * n + place)
    assert initial.read_bytes(models["ids"], n) == 2 * (n + place)
    keys = 2 * (4 * 2 * 16 * n + 2 * 4 * n + 4)
    assert initial.read_bytes(models["keys and values"], n) == keys + place


def test_a_step_does_the_products_of_its_cache(models):
    """After n tokens more, only caches that grow cost more."""
    for name, per_token in {
        "mha": 2 * 2 * 4 * (4 + 4),
        "keys and values": 2 * 2 * 4 * (4 + 4),
        "embeddings": 2 * 2 * 4 * (16 + 16),
        "embeddings, narrow": 2 * 2 * 4 * (4 + 4),
        "ids": 0,
        "counts": 0,
    }.items():
        steps = [initial.step_flops(models[name], n) for n in (1000, 1010)]
        assert steps[1] - steps[0] == 10 * per_token, name


def test_a_filled_cache_is_at_its_context(models):
    for name in ("mha", "sliding 4096", "keys and values", "embeddings"):
        cache = initial.filled_cache(models[name], 9, 12)
        positions = [
            int(leaf.ravel()[0])
            for path, leaf in jax.tree_util.tree_leaves_with_path(cache)
            if jax.tree_util.keystr(path[-1:]) == ".position"
        ]
        assert positions and set(positions) == {9}, name


@pytest.mark.slow
def test_rows_of_every_variant():
    limits = Limits(n_runs=2, n_warmup=0, is_quick=True)
    rows = list(map(flat, within(initial.initial_rows(limits, {}), part="initial")))
    for what in ("prefill", "loop"):
        timed = [row for row in rows if row["pass"] == what and "median_ms" in row]
        assert [row["variant"] for row in timed] == list(initial.VARIANTS)
        ratios = [row for row in rows if row["pass"] == what and "speed_ratio" in row]
        assert len(ratios) == len(initial.VARIANTS) - 1
    assert all(np.isfinite(row["floor_ms"]) for row in rows if "floor_ms" in row)
    device = {"device": "cpu", "jax_version": "0", "date": "2026", "revision": "0"}
    axes = draw_groups(panels(rows), [row | device for row in rows]).axes
    assert len(axes) == 3
