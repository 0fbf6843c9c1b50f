"""Three orders of one grid: equal values, caches, aux, gradients; and what the diagonal costs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx_jax.models import build_model
from longctx_jax.models.schedules import SCHEDULES, run_stack
from longctx_jax.models.schedules.diagonal import diagonal_cells, ramp_phases
from tests.helpers import (
    assert_close,
    assert_trees_close,
    in_float64,
    make_normal,
    random_variables,
    sub_jaxprs,
)

WIDTH, BATCH = 3, 2


def cell(params, x, cache, key=None):
    """A small recurrent layer whose result depends on every input, and on the order of calls."""
    x, label = x
    noise = 0.0 if key is None else jax.random.normal(key, x.shape)
    cache = {
        "state": jnp.tanh(params["keep"] * cache["state"] + x @ params["mix"]),
        "n": cache["n"] + 1,
    }
    y = x + 0.5 * jnp.sin(cache["state"]) * cache["n"] + 0.1 * noise
    return (y, label), cache, {"energy": jnp.sum(y**2), "calls": jnp.ones(())}


def other_cell(params, x, cache, key=None):
    """A layer with other shapes of parameters, cache and aux."""
    x, label = x
    noise = 0.0 if key is None else jax.random.uniform(key, x.shape)
    total = cache + jnp.sum(x, axis=-1)
    y = params * x + jnp.cos(total)[:, None] + 0.1 * noise
    return (y, label), total, {"peak": jnp.sum(total)}


def make_layers(kind, n_layers):
    if kind == "cell":
        return (
            {
                "keep": jnp.float32(make_normal(0, n_layers, WIDTH)),
                "mix": jnp.float32(make_normal(1, n_layers, WIDTH, WIDTH, scale=0.5)),
            },
            {"state": jnp.float32(make_normal(2, n_layers, BATCH, WIDTH)), "n": jnp.ones(n_layers)},
        )
    return jnp.float32(make_normal(3, n_layers)), jnp.float32(make_normal(4, n_layers, BATCH))


def row(tree, index):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[index], tree)


def by_hand(cells, params, xs, caches, n_segments, n_layers, key=None, first_segment=0):
    """Cell by cell in Python: returns ys, caches[l], aux[l] summed over segments."""
    caches, aux, ys = list(caches), [None] * n_layers, []
    for s in range(n_segments):
        x = row(xs, s)
        for l in range(n_layers):
            extra = ()
            if key is not None:
                extra = (jax.random.fold_in(jax.random.fold_in(key, first_segment + s), l),)
            x, caches[l], new = jitted(cells[l % len(cells)])(params[l], x, caches[l], *extra)
            aux[l] = new if aux[l] is None else jax.tree.map(np.add, aux[l], new)
        ys.append(x)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *ys), caches, aux


jitted = functools.cache(jax.jit)


def make_problem(pattern, n_segments, n_layers):
    """Returns cell(s), params, caches as run_stack takes them, and x_segments."""
    x = jnp.float32(make_normal(5, n_segments, BATCH, WIDTH))
    xs = (x, jnp.arange(n_segments * BATCH).reshape(n_segments, BATCH))
    if pattern is None:
        return cell, *make_layers("cell", n_layers), xs
    cells = tuple({"cell": cell, "other": other_cell}[kind] for kind in pattern)
    layers = [make_layers(kind, n_layers // len(pattern)) for kind in pattern]
    return cells, *(tuple(side) for side in zip(*layers, strict=True)), xs


GRIDS = [
    (None, 2, 4, 1),
    (None, 3, 3, 1),
    (None, 1, 3, 1),
    (None, 4, 1, 1),
    pytest.param(None, 6, 4, 2, marks=pytest.mark.slow),
    (("cell", "other"), 4, 4, 1),
    pytest.param(("other", "cell", "cell"), 2, 6, 2, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("pattern", "n_segments", "n_layers", "n_buckets"), GRIDS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_the_grid_by_hand(schedule, pattern, n_segments, n_layers, n_buckets):
    cells, params, caches, xs = make_problem(pattern, n_segments, n_layers)
    key = jax.random.key(1) if n_layers == 4 else None

    @jax.jit
    def run(params, xs, caches):
        return run_stack(
            cells,
            params,
            xs,
            caches,
            schedule=schedule,
            key=key,
            first_segment=7,
            n_ramp_buckets=n_buckets,
        )

    ys, new_caches, aux = run(params, xs, caches)
    period = 1 if pattern is None else len(pattern)

    def layer(tree, l):
        return row(tree if pattern is None else tree[l % period], l // period)

    listed = (
        [layer(params, l) for l in range(n_layers)],
        [layer(caches, l) for l in range(n_layers)],
    )
    cell_list = (cells,) if pattern is None else cells

    expected = by_hand(
        cell_list, listed[0], xs, listed[1], n_segments, n_layers, key, first_segment=7
    )
    assert_trees_close(ys, expected[0], rel_rms=2e-6)
    for l in range(n_layers):
        assert_trees_close(layer(new_caches, l), expected[1][l], rel_rms=2e-6)
        assert_trees_close(layer(aux, l), expected[2][l], rel_rms=5e-6)


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(s, marks=pytest.mark.slow) for s in SCHEDULES],
)
def test_one_program_serves_every_number_of_segments(schedule):
    cells, params, caches, xs = make_problem(("cell", "other"), 4, 4)
    options = {"schedule": schedule, "n_ramp_buckets": 1}
    run = jax.jit(lambda xs, n: run_stack(cells, params, xs, caches, n_active=n, **options))
    for n in (4, 1, 3):
        first = jax.tree.map(lambda leaf, n=n: leaf[:n], xs)
        padding = jax.tree.map(lambda leaf, n=n: jnp.full_like(leaf[n:], 77), xs)
        padded = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, padding)
        ys, *rest = run(padded, jnp.int32(n))
        expected = run_stack(cells, params, first, caches, **options)
        assert_trees_close(jax.tree.map(lambda y, n=n: y[:n], ys), expected[0], rel_rms=2e-6)
        assert_trees_close(tuple(rest), expected[1:], rel_rms=5e-6)
    assert run._cache_size() == 1


@pytest.mark.slow  # those of a model are in tests/laws
@pytest.mark.parametrize(
    ("pattern", "n_segments", "n_layers"),
    [(None, 3, 3), (("cell", "other"), 2, 4)],
    ids=str,
)
def test_gradients_are_equal(pattern, n_segments, n_layers):
    cells, params, caches, (x, label) = make_problem(pattern, n_segments, n_layers)

    def loss(params, x, caches, schedule):
        (ys, _), caches, aux = run_stack(
            cells, params, (x, label), caches, schedule=schedule, n_ramp_buckets=2
        )
        leaves = jax.tree.leaves((ys, caches, aux))
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in leaves)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    expected = gradient(params, x, caches, "sequential")
    assert_trees_close(gradient(params, x, caches, "layerwise"), expected, rel_rms=5e-6)
    assert_trees_close(gradient(params, x, caches, "diagonal"), expected, rel_rms=5e-6)


@pytest.mark.parametrize("n_layers", [2, 5])
@pytest.mark.parametrize("pattern", [None, ("cell", "cell")], ids=str)
def test_a_diagonal_is_one_batched_product_a_pattern_position(pattern, n_layers):
    period = 1 if pattern is None else len(pattern)
    cells, params, caches, xs = make_problem(pattern, 3, n_layers * period)
    run = functools.partial(run_stack, cells, schedule="diagonal", n_ramp_buckets=1)
    jaxpr = jax.make_jaxpr(run)(params, xs, caches).jaxpr
    bodies = [e.params["jaxpr"].jaxpr for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert bodies, "the diagonals are a scan"
    for body in bodies:
        products = [
            e for j in sub_jaxprs(body) for e in j.eqns if e.primitive.name == "dot_general"
        ]
        assert len(products) == period
        assert all(product.invars[0].aval.shape[0] <= n_layers for product in products)
    widest = max(p.invars[0].aval.shape[0] for p in products)
    assert widest == n_layers or len(bodies) > 1


# --- ramps: pure Python ------------------------------------------------------------------------

ramp_grids = given(
    st.integers(1, 12), st.integers(1, 8), st.integers(1, 3), st.sampled_from([1, 2, 4, 100])
)


@ramp_grids
@settings(max_examples=300)
def test_phases_cover_every_active_cell(n_segments, n_repeats, pattern_len, n_buckets):
    n_layers = n_repeats * pattern_len
    phases = ramp_phases(n_segments, n_repeats, pattern_len, n_buckets)
    assert phases[0].start == 0 and phases[-1].stop == n_segments + n_layers - 1
    for before, after in zip(phases[:-1], phases[1:], strict=True):
        assert before.stop == after.start
        assert before.low <= after.low and before.high <= after.high
    for phase in phases:
        assert phase.start < phase.stop and 0 <= phase.low < phase.high <= n_repeats
        for t in range(phase.start, phase.stop):
            active = {l // pattern_len for l in range(n_layers) if 0 <= t - l < n_segments}
            assert active <= set(range(phase.low, phase.high))


@ramp_grids
@settings(max_examples=100)
def test_cells_are_counted(n_segments, n_repeats, pattern_len, n_buckets):
    phases = ramp_phases(n_segments, n_repeats, pattern_len, n_buckets)
    counted = sum(
        1
        for phase in phases
        for _ in range(phase.start, phase.stop)
        for _ in range(phase.low * pattern_len, phase.high * pattern_len)
    )
    assert diagonal_cells(n_segments, n_repeats, pattern_len, n_buckets) == counted
    useful = n_segments * n_repeats * pattern_len
    everything = (n_segments + n_repeats * pattern_len - 1) * n_repeats * pattern_len
    assert useful <= counted <= everything
    if n_buckets == 100 and pattern_len == 1:
        assert counted == useful  # one width a diagonal wastes nothing
    assert counted <= diagonal_cells(n_segments, n_repeats, pattern_len, 1)


@pytest.mark.parametrize("shape", [(64, 24), (8, 24), (24, 24)], ids=str)
def test_more_buckets_waste_less(shape):
    cells = [diagonal_cells(*shape, n_buckets=n) for n in (1, 2, 4, 8, 100)]
    assert cells == sorted(cells, reverse=True)
    assert cells[-1] == shape[0] * shape[1] < cells[0]


# --- errors ------------------------------------------------------------------------------------


def test_unknown_schedule():
    with pytest.raises(ValueError, match="one of .*: got 'wavefront'; set config.model.schedule"):
        run_stack(*make_problem(None, 2, 2)[:2], None, None, schedule="wavefront")


def test_several_segments_need_caches():
    cells, params, _, xs = make_problem(None, 3, 2)
    with pytest.raises(ValueError, match="caches=None and 3 segments; make caches with init_cache"):
        run_stack(cells, params, xs, None)


@pytest.mark.parametrize("where", ["params", "x_segments"])
def test_unequal_leading_axes(where):
    cells, params, caches, xs = make_problem(None, 3, 2)
    if where == "params":
        params = {**params, "mix": params["mix"][:1]}
    else:
        xs = (xs[0], xs[1][:2])
    with pytest.raises(ValueError, match=f"leaf of {where} must have the same leading axis: got"):
        run_stack(cells, params, xs, caches)


def test_patterns_must_match_their_parameters():
    cells, params, caches, xs = make_problem(("cell", "other"), 2, 4)
    with pytest.raises(ValueError, match="one entry a pattern position: got 1 for 2 cells"):
        run_stack(cells, params[:1], xs, caches)
    short = (params[0], params[1][:1])
    with pytest.raises(ValueError, match=r"repeat equally often: got \[1, 2\]"):
        run_stack(cells, short, xs, caches)


# --- through a model ---------------------------------------------------------------------------

TOKENS = np.random.default_rng(0).integers(0, 11, (2, 11), np.int32)


def model_gradients(fields, schedule, segment_len=4):
    """Returns the loss, logits and gradients of 11 tokens, the last segment ragged."""
    model = build_model(
        {**fields, "schedule": schedule, "segment_len": segment_len, "n_ramp_buckets": 1}
    )
    variables = random_variables(lambda: model.init(jax.random.key(0)))
    variables = jax.tree.map(lambda leaf: leaf.astype(fields.get("dtype", leaf.dtype)), variables)

    @jax.jit
    def run(params):
        def loss(params):
            rngs = {"dropout": jax.random.key(2)}
            out = model.apply({**variables, "params": params}, TOKENS, train=True, rngs=rngs)
            return jnp.sum(jnp.sin(out.logits)), out.logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    return run(variables["params"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mha", "mixed", "vq", "vq_gated", "rwkv4", "rwkv6", "mamba1", "mamba2"]
)
@in_float64
def test_a_model_with_dropout_and_a_ragged_tail(name, model_fields):
    """In float64: gradients that almost cancel would need a loose tolerance in float32."""
    fields = model_fields(name, dropout=0.3, dtype="float64")
    expected = model_gradients(fields, "sequential")
    for schedule in ("diagonal", "layerwise"):
        assert_trees_close(model_gradients(fields, schedule), expected, rel_rms=2e-7)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["diagonal", "layerwise"])
def test_segments_change_nothing_without_dropout(schedule, model_fields):
    fields = model_fields("decay")
    whole = build_model(fields)
    cut = build_model({**fields, "schedule": schedule, "segment_len": 4, "n_ramp_buckets": 1})
    variables = random_variables(lambda: whole.init(jax.random.key(0)))
    expected = whole.apply(variables, TOKENS, whole.init_cache(2, 11))
    actual = cut.apply(variables, TOKENS, cut.init_cache(2, 11))
    assert_close(actual.logits, expected.logits, rel_rms=2e-6)
    assert_trees_close(actual.cache, expected.cache, rel_rms=2e-6)
