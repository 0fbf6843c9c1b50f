"""Staggered stacks against their definition: numpy, loops over documents, stacks and layers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.decoding import generate
from longctx_jax.models import build_model
from longctx_jax.models.stagformer import stacks
from longctx_jax.models.stagformer.lanes import place_stacks
from longctx_jax.models.stagformer.state import take_lane
from longctx_jax.training.step import merge_cache_rows, split_cache_rows
from tests.helpers import (
    assert_close,
    assert_trees_close,
    in_float64,
    make_normal,
    run_on_devices,
    run_two_processes,
    sub_jaxprs,
)

BATCH, SEQ, WIDTH, HEADS = 2, 11, 8, 2
TOKENS = np.random.default_rng(0).integers(0, 11, (BATCH, SEQ), np.int32)
DOCUMENTS = np.array([[0] * 4 + [1] * 7, [3] * 10 + [4]], np.int32)
VARIANTS = {
    "separate": {},
    "shared": {"share_weights": True, "cross_window": 3},
    "linear_map": {"cross_window": 1},
    "three": {"n_stacks": 3, "combine": "linear"},
    "passes": {"share_weights": True},
    "three_shared": {"n_stacks": 3, "share_weights": True},
    "memory": {"cross_cache": "memory", "cross_position": "none"},
    "four": {"n_stacks": 4, "combine": "linear", "cross_window": 2},
    "memory_window": {"cross_cache": "memory", "cross_position": "none", "cross_window": 4},
    "add": {"handoff": "add", "share_weights": True},
    "control": {"stagger": False},
}
FAST = ("separate", "shared")


def variants(names=tuple(VARIANTS), fast=FAST):
    marks = {True: (), False: pytest.mark.slow}
    params = [pytest.param(name, marks=marks[name in fast]) for name in names]
    return pytest.mark.parametrize("name", params)


def make(name, dtype="float64", **changes):
    """Returns a model of two layers a stack, and variables in which every part is at work."""
    stag = VARIANTS[name]
    fields = {"n_layers": 2 * stag.get("n_stacks", 2), "d_model": WIDTH, "n_heads": HEADS}
    fields |= {"vocab_size": 11, "d_ff": 8, "dtype": dtype, "name": "stagformer"}
    model = build_model({**fields, "stagformer": stag, **changes})
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: model.init(jax.random.key(0))))
    arrays = [make_normal(i, *leaf.shape, scale=0.5).astype(dtype) for i, leaf in enumerate(leaves)]
    return model, jax.tree.unflatten(tree, arrays)


def with_options(model, **stag):
    """Returns the model with other options of staggering and the same weights."""
    fields = {"name": "stagformer"} | {
        field: getattr(model.config, field)
        for field in ("n_layers", "d_model", "n_heads", "vocab_size", "d_ff", "dtype")
    }
    chosen = {
        field: getattr(model.config.stagformer, field)
        for field in model.config.stagformer.__dataclass_fields__
    }
    return build_model({**fields, "stagformer": chosen | stag})


def rms(x, params):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * params["scale"]


def rotate(x, positions):
    """[seq, heads, width], halves rotated by position times frequency."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10_000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(x, source, params, visible, positions):
    """Softmax attention with `positions` of queries and sources, or None for no rotation."""
    query, key, value = (
        (rows @ params[name]["kernel"]).reshape(len(rows), HEADS, -1)
        for name, rows in (("query", x), ("key", source), ("value", source))
    )
    if positions is not None:
        query, key = rotate(query, positions[0]), rotate(key, positions[1])
    scores = np.einsum("thk,shk->hts", query, key) / np.sqrt(query.shape[-1])
    weights = np.where(visible, np.exp(scores - scores.max()), 0.0)
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hts,shv->thv", weights, value).reshape(len(x), -1) @ params["out"]["kernel"]


def swish_mlp(x, params):
    gate, up, down = (params[name]["kernel"] for name in ("gate", "up", "down"))
    hidden = x @ gate
    return hidden / (1 + np.exp(-hidden)) * (x @ up) @ down


def run_stack(model, params, s, embedded, memory, start):
    """Stack s over one document; `memory` row 0 is the first slot (absent in the control)."""
    stag, n = model.config.stagformer, model.config.n_layers // model.config.stagformer.n_stacks
    ((_, blocks),) = params["stack"].items()
    x, seq = embedded, len(embedded)
    if memory is not None and stag.handoff == "add":
        x = x + memory
    token = np.arange(start, start + seq)
    causal = np.tril(np.ones((seq, seq), bool))
    for layer in range(n):
        at = (layer,) if stag.share_weights else (layer, s)
        block = jax.tree.map(lambda leaf, at=at: leaf[at], blocks)
        hidden = rms(x, block["mixer_norm"])
        x = x + attend(hidden, hidden, block["mixer"], causal, (token, token))
        if memory is not None and stag.handoff == "cross":
            ((_, cross),) = params["cross"].items()
            at = (layer,) if stag.share_weights else (layer, s - 1)
            cross = jax.tree.map(lambda leaf, at=at: leaf[at], cross)
            if stag.cross_window == 1:
                x = x + memory @ cross["linear"]["kernel"]
            else:
                near = causal & ~np.tril(causal, -(stag.cross_window or seq))
                delay = 1 if stag.stagger else 0  # the source of row j is token j - delay
                where = (token, token - delay) if stag.cross_position == "rotary" else None
                x = x + attend(rms(x, cross["norm"]), memory, cross, near, where)
        x = x + swish_mlp(rms(x, block["mlp_norm"]), block["mlp"])
    return x


def definition(model, variables, tokens, start):
    """Returns the logits of one document whose first token is number `start` of its row."""
    params, stag = variables["params"], model.config.stagformer
    table = params["embed"]["table"]
    outputs, memory = [], None
    for s in range(stag.n_stacks):
        if s > 0:
            first = np.zeros(WIDTH)
            if stag.stagger:
                first = params["handover"]["first"][s - 1]
            rows = outputs[-1]
            if stag.stagger:
                rows = np.concatenate([first[None], rows[:-1]])
            norms = params["handover"]["norm"]
            memory = rms(rows, {"scale": norms["scale"][s - 1]})
        outputs.append(run_stack(model, params, s, table[tokens], memory, start))
    y = outputs[-1]
    if stag.combine == "linear":
        y = np.einsum("s,std->td", params["combine"], np.stack(outputs))
    return rms(y, params["norm"]) @ table.T


def expected_logits(model, variables):
    rows = []
    for tokens, documents in zip(TOKENS, DOCUMENTS, strict=True):
        cuts = [0, *(np.flatnonzero(np.diff(documents)) + 1), SEQ]
        pieces = zip(cuts[:-1], cuts[1:], strict=True)
        rows.append(
            np.concatenate([definition(model, variables, tokens[a:b], a) for a, b in pieces])
        )
    return np.stack(rows)


def in_calls(model, variables, lengths, max_len=SEQ):
    """Returns the logits of calls of these lengths, and the last cache."""
    cache, start, logits = model.init_cache(BATCH, max_len), 0, []
    for length in lengths:
        piece = slice(start, start + length)
        out = model.apply(
            variables, TOKENS[:, piece], cache, segment_ids=jnp.asarray(DOCUMENTS[:, piece])
        )
        cache = out.cache
        logits.append(out.logits)
        start += length
    return np.concatenate(logits, axis=1), cache


@variants()
@in_float64
def test_logits_equal_the_definition(name):
    model, variables = make(name)
    logits = model.apply(variables, TOKENS, segment_ids=DOCUMENTS).logits
    assert_close(logits, expected_logits(model, variables), rel_rms=1e-12)


@variants(fast=("separate",))
@in_float64
def test_any_split_is_the_definition(name):
    """A prompt, tokens one by one in lanes, and another call of several tokens."""
    model, variables = make(name)
    logits, _ = in_calls(model, variables, [4, 1, 1, 1, 4])
    assert_close(logits, expected_logits(model, variables), rel_rms=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"pattern": ("sliding", "decay"), "sliding": {"window_len": 4}, "decay": {"chunk_len": 4}},
        {"pattern": ("vq",), "vq": {"codebook_size": 7, "window_len": 4}},
        {"pattern": ("rwkv", "mamba"), "mlp": "rwkv", "mamba": {"head_len": 8, "chunk_len": 4}},
        {"segment_len": 4},
        {"segment_len": 3, "schedule": "diagonal"},
        {"segment_len": 3, "schedule": "sequential", "remat": "full"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["separate", "shared"])
@in_float64
def test_any_mixer_and_schedule(name, changes):
    model, variables = make(name, **changes)
    logits, _ = in_calls(model, variables, [1] * SEQ)
    expected = model.apply(variables, TOKENS, segment_ids=DOCUMENTS).logits
    assert_close(logits, expected, rel_rms=1e-7)  # decay powers are float32


@variants(["separate", "shared", "memory"], fast=[])
@in_float64
def test_lanes_are_the_stacks_one_after_the_other(name):
    """The same logits, and the same caches of every stack."""
    model, variables = make(name)
    slow = with_options(model, decode="sequential")
    found, expected = (in_calls(m, variables, [4, 1]) for m in (model, slow))
    assert_close(found[0], expected[0], rel_rms=1e-12)
    assert_trees_close(found[1].carried, expected[1].carried, rel_rms=1e-12)
    for stack in range(model.config.stagformer.n_stacks):
        lane, own = (
            take_lane(m.config, cache.layers, stack)
            for m, (_, cache) in ((model, found), (slow, expected))
        )
        assert_trees_close(lane, own, rel_rms=1e-12)
    with pytest.raises(ValueError, match="decoding model's own"):
        model.apply(variables, TOKENS[:, :1], expected[1])


def n_products(model, seq):
    """Returns how many matrix products one call of seq tokens is, loops not unrolled."""
    tokens = jnp.zeros((BATCH, seq), jnp.int32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    cache = jax.eval_shape(lambda: model.init_cache(BATCH, SEQ))
    jaxpr = jax.make_jaxpr(model.apply)(variables, tokens, cache)
    return sum(e.primitive.name == "dot_general" for j in sub_jaxprs(jaxpr) for e in j.eqns)


@pytest.mark.parametrize("name, n_cross", [("separate", 6), ("three", 7), ("linear_map", 1)])
def test_a_step_is_one_loop_whatever_the_number_of_stacks(name, n_cross):
    """Products of one stack's layer, plus those of cross-attention (three also sums stacks)."""
    dense = build_model({"n_layers": 2, "d_model": WIDTH, "n_heads": HEADS, "d_ff": 8})
    model, _ = make(name, "float32")
    assert n_products(model, 1) == n_products(dense, 1) + n_cross


def test_a_window_of_one_is_a_linear_map_without_a_cache():
    model, variables = make("linear_map", "float32")
    (cross,) = variables["params"]["cross"].values()
    assert jax.tree.map(np.shape, cross) == {"linear": {"kernel": (2, 1, WIDTH, WIDTH)}}
    layers = jax.eval_shape(lambda: model.init_cache(BATCH, SEQ)).layers
    assert layers.ring is None and layers.positions[0].cross is None


def test_caches_are_what_the_formula_says():
    """A token: keys and values of each layer, and of each upper layer's cross-attention."""

    def size(name, max_len):
        model, _ = make(name, "float32")
        layers = jax.eval_shape(lambda: model.init_cache(1, max_len)).layers
        return sum(leaf.size for leaf in jax.tree.leaves(layers))

    places = 2  # each slot of a ring knows its position and document
    own, upper = 4 * (2 * WIDTH + places), 2 * (2 * WIDTH + places)
    assert size("separate", 9) - size("separate", 8) == own + upper
    assert size("memory", 9) - size("memory", 8) == own + WIDTH + places  # rows, once
    assert size("shared", 9) - size("shared", 8) == own  # window 3
    assert size("linear_map", 9) - size("linear_map", 8) == own


@pytest.mark.slow
@in_float64
def test_gradients_reach_every_parameter_of_both_stacks():
    model, variables = make("separate")

    def loss(params):
        logits = model.apply({**variables, "params": params}, TOKENS).logits
        return jnp.sum(jax.nn.log_softmax(logits)[:, :-1, 0])

    grads = jax.grad(loss)(variables["params"])
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.all(np.isfinite(leaf)), path
        lanes = jnp.moveaxis(leaf, 1, 0) if "'stack'" in jax.tree_util.keystr(path) else leaf[None]
        assert all(jnp.any(lane != 0) for lane in lanes), path


@pytest.mark.slow
@in_float64
def test_the_recurrent_approximation_starts_exact_and_then_sees_itself():
    model, variables = make("passes")
    quick = with_options(model, recurrent=True)
    params, tokens = variables["params"], TOKENS[0]
    table, n_prompt = params["embed"]["table"], 4
    norm = jax.tree.map(lambda leaf: leaf[0], params["handover"]["norm"])
    first_pass = run_stack(model, params, 0, table[tokens], None, 0)
    memory = np.concatenate([params["handover"]["first"], first_pass[:n_prompt]])
    cache = quick.init_cache(1, SEQ)
    cache = quick.apply(variables, tokens[None, :n_prompt], cache).cache
    exact = model.apply(variables, tokens[None]).logits[0]
    for t in range(n_prompt, n_prompt + 3):
        out = quick.apply(variables, tokens[None, t : t + 1], cache)
        cache = out.cache
        # The definition grows by a row at a time; row t + 1 is the last pass's own output.
        y = run_stack(model, params, 1, table[tokens[: t + 1]], rms(memory[: t + 1], norm), 0)
        memory = np.concatenate([memory, y[-1:]])
        expected = rms(y[-1], params["norm"]) @ table.T
        assert_close(out.logits[0, 0], expected, rel_rms=1e-12)
        assert (np.max(np.abs(expected - exact[t])) < 1e-12) == (t == n_prompt)


@pytest.mark.slow
def test_prompts_of_recurrent_models_do_not_depend_on_their_pieces():
    """A piece of one token is part of the prompt, not decoded."""
    model, variables = make("passes", "float32")
    quick = with_options(model, recurrent=True)
    options = {"max_new_tokens": 4, "key": jax.random.key(0)}
    whole = generate(quick, variables, [TOKENS[0, :5]], **options)
    assert np.array_equal(
        generate(quick, variables, [TOKENS[0, :5]], prefill_len=4, **options), whole
    )
    exact = generate(model, variables, [TOKENS[0, :5]], **options)
    assert np.array_equal(whole[:, :2], exact[:, :2])


@pytest.mark.slow
def test_codebooks_of_all_stacks_learn():
    """Own weights have own codebooks; shared ones are fed by every pass."""
    changes = {"pattern": ("vq",), "vq": {"codebook_size": 5, "window_len": 4}}
    for name, axes in (("separate", (2, 2)), ("shared", (2,))):
        model, variables = make(name, "float32", **changes)
        variables = model.init(jax.random.key(0))
        out = model.apply(variables, TOKENS, train=True, rngs=None)
        state = variables["model_state"]
        new = model.update_model_state(state, out.aux, jax.random.key(1))
        before, after = (s["stack"]["0_vq"]["mixer"]["codebook"].counts for s in (state, new))
        assert after.shape[: len(axes)] == axes == before.shape[: len(axes)]
        n_seen = BATCH * SEQ * (1 if name == "separate" else 2)
        kept = 0.99 * jnp.sum(before, -1) + 0.01 * n_seen
        assert_close(jnp.sum(after, -1), np.asarray(kept), rel_rms=1e-6)
        assert np.all(np.isfinite(list(model.describe_model_state(new).values())))


@pytest.mark.slow
def test_dropout_differs_between_stacks_not_between_calls():
    """Passes of shared weights whose memory is zero do the same, but for what they drop."""
    model, variables = make("add", "float32", dropout=0.5)
    handover = jax.tree.map(jnp.zeros_like, variables["params"]["handover"])
    params = variables["params"] | {"handover": handover}
    x = jnp.asarray(make_normal(5, BATCH, SEQ, WIDTH), jnp.float32)

    def outputs(train, seed=0):
        options = {"key": jax.random.key(seed) if train else None, "train": train}
        return stacks._stack_after_stack(model.config, params, {}, x, None, None, **options)[0]

    below, above = outputs(train=False)
    assert_close(above, below, rel_rms=1e-6)
    below, above = outputs(train=True)
    assert jnp.mean(jnp.abs(below - above)) > 0.1
    assert_trees_close(outputs(train=True), [below, above], rel_rms=0.0)
    assert jnp.mean(jnp.abs(outputs(train=True, seed=1)[0] - below)) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["separate", "memory", "control"])
def test_rows_of_a_cache_split_and_merge(name):
    model, variables = make(name, "float32")
    cache = model.apply(variables, TOKENS, model.init_cache(BATCH, SEQ)).cache
    halves = split_cache_rows(cache, BATCH)
    assert_trees_close(merge_cache_rows(halves), cache, rel_rms=0.0)
    first = model.apply(variables, TOKENS[:1], model.init_cache(1, SEQ)).cache
    assert_trees_close(jax.tree.map(lambda leaf: leaf[0], halves), first, rel_rms=1e-6)


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"n_layers": 6, "stagformer": {"n_stacks": 4}}, "use n_layers=8"),
        ({"stagformer": {"n_stacks": 1}}, "or use config.model.name='transformer'"),
        ({"stagformer": {"handoff": "add", "cross_window": 128}}, "set cross_window=0"),
        ({"stagformer": {"cross_window": 1, "cross_cache": "memory"}}, "set cross_position='none'"),
        (
            {"stagformer": {"handoff": "add", "cross_cache": "memory", "cross_position": "none"}},
            "set cross_cache='kv'",
        ),
        (
            {"stagformer": {"recurrent": True, "share_weights": True, "decode": "lanes"}},
            "got decode='lanes'; set decode='auto'",
        ),
        ({"stagformer": {"cross_window": -1}}, "stagformer.cross_window"),
        ({"stagformer": {"handoff": "sum"}}, "['cross', 'add']"),
        ({"stagformer": {"cross_cache": "memory"}}, "set cross_position='none'"),
        ({"stagformer": {"recurrent": True}}, "share_weights=True"),
        ({"stagformer": {"stagger": False, "decode": "lanes"}}, "set decode='auto'"),
        ({"stagformer": {"stagger": False, "stack_axis": "s"}}, "stack_axis needs staggered"),
        ({"layer_axis": "a", "schedule": "diagonal"}, "use stagformer.stack_axis"),
        (
            {"segment_len": 4, "stagformer": {"cross_cache": "memory", "cross_position": "none"}},
            "use cross_cache='kv'",
        ),
    ],
    ids=str,
)
def test_contradictions_are_named(fields, text):
    with pytest.raises(ValueError) as caught:
        build_model({"name": "stagformer", "n_layers": 4, **fields})
    assert text in str(caught.value)


def check_two_devices(mesh):
    """Stacks on two devices decode what one device decodes; each keeps the caches of its own."""
    for name in ("separate", "shared", "memory", "linear_map", "add", "four"):
        model, variables = make(name, "float32")
        spread = with_options(model, stack_axis="stack")
        prompts = [TOKENS[0, :5], TOKENS[1, :5]]
        expected = generate(model, variables, prompts, max_new_tokens=4)
        logits, _ = in_calls(model, variables, [4, 1, 1])
        with jax.set_mesh(mesh):
            placed = place_stacks(spread.config, variables, mesh)
            assert np.array_equal(generate(spread, placed, prompts, max_new_tokens=4), expected)
            found, cache = in_calls(spread, placed, [4, 1, 1])
            step = jax.jit(spread.apply).lower(placed, TOKENS[:, :1], cache).compile()
        assert_close(found, logits, rel_rms=1e-5)
        messages = re.findall(r"(all-\w+|collective-permute|reduce-scatter)\(", step.as_text())
        assert sorted(messages) == ["all-reduce", "collective-permute"], (name, messages)
        for leaf in jax.tree.leaves(cache.layers):
            assert leaf.sharding.spec[1] == "stack", name
    model, _ = make("three", "float32")
    with pytest.raises(ValueError, match="2 devices and 3 stacks"):
        place_stacks(with_options(model, stack_axis="stack").config, {"params": {}}, mesh)


@pytest.mark.slow
def test_stacks_of_two_processes():
    for out in run_two_processes("tests.models.two_process_stacks"):
        assert "devices=2 processes=2" in out
        assert float(out.split("worst=")[1]) < 1e-5


@pytest.mark.slow
def test_stacks_on_two_devices():
    program = """
import jax
from tests.models import test_stagformer as t
kinds = (jax.sharding.AxisType.Auto,)
t.check_two_devices(jax.make_mesh((2,), ("stack",), axis_types=kinds, devices=jax.devices()[:2]))
"""
    run_on_devices(program)
