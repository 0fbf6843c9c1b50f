"""Recurrent memory against its definition: loops over segments and layers, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from longctx_jax.models.decoder import Decoder
from longctx_jax.models.recurrent_memory import cells
from longctx_jax.models.recurrent_memory.cells import surround
from longctx_jax.models.recurrent_memory.state import make_layers
from longctx_jax.models.stack import call_module
from longctx_jax.nn.contract import Documents
from longctx_jax.nn.norms import make_norm
from longctx_jax.ops.memory import reference
from tests.helpers import assert_close, assert_trees_close, in_float64, make_normal

BATCH, SEQ, SEGMENT, N_MEMORY = 2, 14, 4, 2
TOKENS = np.random.default_rng(0).integers(0, 11, (BATCH, SEQ), np.int32)
# Documents that start at a segment's start, inside one, and twice in one.
DOCUMENTS = np.array([[0] * 4 + [1] * 5 + [2] * 5, [3] * 2 + [4] * 7 + [5] + [6] * 4], np.int32)
MEMORY = {"segment_len": SEGMENT, "n_memory_tokens": N_MEMORY, "d_memory": 4}
MODELS = {
    "armt": {},
    "layerwise": {"kind": "layerwise"},
    "rmt": {"kind": "rmt"},
    "mixed": {"n_heads": 2},  # ARMT layers among others, which run on from segment to segment
}


def slow_but(quick, names):
    """Returns the parameters, all but one of them for the slow tests."""
    return [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@functools.cache
def make(name, **changes):
    """Returns the tiny float64 model, and variables in which every memory is at work."""
    fields = {"n_layers": 2, "d_model": 8, "n_heads": 2, "vocab_size": 11, "d_ff": 8}
    fields |= {"sliding": {"window_len": 5}, "vq": {"codebook_size": 3, "window_len": 3}}
    if name == "mixed":
        fields |= {"pattern": ("armt", "sliding")}
    memory = {**MEMORY, **MODELS[name]}
    memory |= {key: changes.pop(key) for key in tuple(changes) if key in ("bptt_segments", "mixer")}
    fields |= {"name": "recurrent_memory", "dtype": "float64", "memory": memory}
    model = build_model({**fields, **changes})
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: model.init(jax.random.key(0))))
    arrays = [make_normal(i, *leaf.shape, scale=0.4) for i, leaf in enumerate(leaves)]
    return model, jax.tree.unflatten(tree, arrays)


def definition(model, variables, tokens):
    """Returns logits of one row of tokens: segments outside, layers inside, no schedule."""
    config, params = model.config, variables["params"]
    memory = config.memory
    rows = [jax.tree.map(lambda a, r=r: a[r], params["stack"]) for r in range(config.n_layers)]
    extra = [
        jax.tree.map(lambda a, r=r: a[r], params["memory"]["layers"])
        for r in range(config.n_layers)
    ]
    (name,) = params["stack"]
    (block,) = (layer.block for layer in make_layers(config))
    embedded = params["embed"]["table"][tokens]
    n_features = 2 * memory.nu * memory.d_memory
    matrix = [np.zeros((n_features, config.d_model)) for _ in rows]
    normalizer = [np.zeros(n_features) for _ in rows]
    own = [layer[name].get("tokens") for layer in extra]
    carried = params["memory"].get("tokens")
    out = []
    for s, start in enumerate(range(0, len(tokens), SEGMENT)):
        x = embedded[start : start + SEGMENT]
        n = len(x)
        if memory.kind == "armt":
            x = np.concatenate([x, params["memory"]["tokens"]])
        elif memory.kind == "rmt":
            x = np.concatenate([carried, x, carried])
        for layer in range(len(rows)):
            weights = extra[layer][name]
            if memory.kind == "layerwise":
                x = np.concatenate([own[layer], x, own[layer]])
            if memory.kind == "armt" and s > 0:
                queries = x @ weights["query"]["kernel"]
                recalled = [
                    reference.read(reference.dpfp(q, memory.nu), matrix[layer], normalizer[layer])
                    for q in queries
                ]
                x = x + np.stack(recalled)
            x = np.asarray(call_module(block, rows[layer][name], x[None], None)[0][0])
            if memory.kind == "layerwise":
                own[layer], x = x[-N_MEMORY:], x[N_MEMORY:-N_MEMORY]
            if memory.kind == "armt":
                written = x[-N_MEMORY:]
                features = [
                    reference.dpfp(k, memory.nu) for k in written @ weights["key"]["kernel"]
                ]
                logits = written @ weights["beta"]["kernel"] + weights["beta"]["bias"]
                matrix[layer], normalizer[layer], _ = reference.write(
                    np.stack(features),
                    written @ weights["value"]["kernel"],
                    1 / (1 + np.exp(-logits[:, 0])),
                    matrix[layer],
                    normalizer[layer],
                    is_empty=s == 0,
                )
        x = np.asarray(call_module(make_norm(config.norm, config.dtype), params["norm"], x))
        if memory.kind == "rmt":
            carried, x = x[-N_MEMORY:], x[N_MEMORY:]
        out.append(x[:n])
    return np.concatenate(out) @ params["embed"]["table"].T


@in_float64
@pytest.mark.slow  # goldens of the papers: test_published_equations.py
@pytest.mark.parametrize("name", ("armt", "layerwise", "rmt"))
def test_logits_equal_the_definition(name):
    model, variables = make(name)
    logits = model.apply(variables, TOKENS).logits
    for row in range(BATCH):
        assert_close(logits[row], definition(model, variables, TOKENS[row]), rel_rms=1e-12)


@functools.cache
def one_call(name, has_documents, **changes):
    model, variables = make(name, **changes)
    documents = DOCUMENTS if has_documents else None
    return np.asarray(model.apply(variables, TOKENS, segment_ids=documents).logits)


def in_calls(model, variables, lengths, documents):
    cache, start, logits = model.init_cache(BATCH, SEQ), 0, []
    for length in lengths:
        here = slice(start, start + length)
        ids = None if documents is None else documents[:, here]
        out = model.apply(variables, TOKENS[:, here], cache, segment_ids=ids)
        cache, start = out.cache, start + length
        logits.append(out.logits)
    return np.concatenate(logits, axis=1), cache


SPLITS = ((1,) * SEQ, (8, 6), (2, 6, 6), (3, 5, 6))  # 6: in pieces of 2, or of 1


@in_float64
@pytest.mark.parametrize("has_documents", (pytest.param(False, marks=pytest.mark.slow), True))
@pytest.mark.parametrize("name", slow_but("armt", MODELS))
def test_any_split_is_the_one_call(name, has_documents):
    model, variables = make(name)
    expected = one_call(name, has_documents)
    caches = []
    for lengths in (((1,) * 6 + (8,)),) if has_documents and name == "armt" else SPLITS:
        documents = DOCUMENTS if has_documents else None
        logits, cache = in_calls(model, variables, lengths, documents)
        assert_close(logits, expected, rel_rms=1e-12)
        caches.append(cache.carried)
    assert np.all(caches[0].position == SEQ % SEGMENT)
    assert_trees_close(caches[-1], caches[0], rel_rms=1e-12)


@in_float64
@pytest.mark.slow
@pytest.mark.parametrize("mixer", ("vq", "sliding"))
@pytest.mark.parametrize("name", ("armt", "rmt"))
def test_any_mixer_goes_inside(name, mixer):
    model, variables = make(name, mixer=mixer)
    logits, _ = in_calls(model, variables, (3, 5, 6), DOCUMENTS)
    assert_close(logits, one_call(name, True, mixer=mixer), rel_rms=1e-12)


@in_float64
@pytest.mark.parametrize("name", ("armt",))
def test_documents_see_nothing_before_them(name):
    model, variables = make(name)
    expected = one_call(name, True)
    changed = TOKENS.copy()
    changed[0, :4] = (changed[0, :4] + 1) % 11  # the first document of row 0
    changed[1, 9] = (changed[1, 9] + 1) % 11  # a document of one token, inside a segment
    logits = np.asarray(model.apply(variables, changed, segment_ids=DOCUMENTS).logits)
    np.testing.assert_array_equal(logits[0, 4:], expected[0, 4:])
    np.testing.assert_array_equal(logits[1, :9], expected[1, :9])
    np.testing.assert_array_equal(logits[1, 10:], expected[1, 10:])
    # Without documents, the memory carries the change all the way.
    free = np.asarray(model.apply(variables, changed).logits)
    assert np.all(np.abs(free - one_call(name, False)).max(-1)[0, 4:] > 1e-9)


def run_schedule(name, schedule, n_layers, n_tokens):
    """Returns loss, gradients and cache of calls with this schedule."""
    model, variables = make(name, schedule=schedule, n_layers=n_layers, n_ramp_buckets=2)
    cache = model.init_cache(BATCH, SEQ)
    weights = make_normal(9, BATCH, n_tokens, 11)

    @jax.jit
    def loss(params):
        out = model.apply({**variables, "params": params}, TOKENS[:, :n_tokens], cache)
        return jnp.sum(out.logits * weights), (out.cache, out.logits)

    (_, (cache, logits)), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return logits, cache, grads


@in_float64
def test_the_diagonal_is_the_sequence():
    """Forward only; gradients and caches below."""
    expected = one_call("armt", False, schedule="sequential", n_layers=3)
    # One bucket: on the ramps layers run that have nothing to do, and must not write.
    found = one_call("armt", False, schedule="diagonal", n_layers=3, n_ramp_buckets=1)
    assert_close(found, expected, rel_rms=1e-12)


@in_float64
@pytest.mark.parametrize(
    ("name", "n_layers", "n_tokens"),
    [
        pytest.param("armt", 3, 12, marks=pytest.mark.slow),
        pytest.param("armt", 4, 8, marks=pytest.mark.slow),
        pytest.param("layerwise", 3, 14, marks=pytest.mark.slow),
        pytest.param("mixed", 4, 14, marks=pytest.mark.slow),
    ],
)
def test_schedules_agree(name, n_layers, n_tokens):
    expected = run_schedule(name, "sequential", n_layers, n_tokens)
    for schedule in ("diagonal", "layerwise"):
        logits, cache, grads = run_schedule(name, schedule, n_layers, n_tokens)
        assert_close(logits, expected[0], rel_rms=1e-12)
        assert_trees_close(cache, expected[1], rel_rms=1e-12)
        assert_trees_close(grads, expected[2], rel_rms=1e-11)


def first_reached(name, every, n_before, n_tokens):
    """Returns the first of a call's tokens to which its last output has a gradient.

    `n_before` tokens are in the cache that the call is given; None = no cache.
    """
    model, variables = make(name, bptt_segments=every, vocab_size=4 * SEGMENT)
    tokens = np.arange(n_tokens)[None]
    weights = make_normal(3, 8)
    cache = None
    if n_before is not None:
        cache = model.init_cache(1, 4 * SEGMENT)
        if n_before:
            cache = model.hidden(variables, tokens[:, :n_before], cache).cache

    def last(embed):
        params = {**variables["params"], "embed": embed}
        hidden = model.hidden({**variables, "params": params}, tokens, cache).hidden
        return jnp.sum(hidden[0, -1] * weights)

    grads = jax.grad(last)(variables["params"]["embed"])["table"]
    return int(np.argmax(np.any(np.asarray(grads), axis=-1)))


CALLS = {  # tokens in front, tokens; the first token of the call's third segment
    "whole": (None, 12, 8),
    "unfinished": (None, 11, 8),
    "cached": (0, 11, 8),
    "pieces": (2, 10, 6),
}


@pytest.mark.slow
@in_float64
@pytest.mark.parametrize("every", slow_but(2, (2, 3)))
@pytest.mark.parametrize("call", slow_but("unfinished", CALLS))
@pytest.mark.parametrize("name", slow_but("armt", MODELS))
def test_truncation_truncates(name, call, every):
    n_before, n_tokens, third = CALLS[call]
    assert first_reached(name, every, n_before, n_tokens) == (third if every == 2 else 0)


@pytest.mark.slow
@in_float64
@pytest.mark.parametrize("lengths", [(), (13,), (7, 5, 1)], ids=str)
def test_a_cache_with_room_for_the_tokens_is_large_enough(lengths):
    """Memory tokens push none of them out of the cache of a layer of full attention."""
    model, variables = make("armt", pattern=("softmax", "armt"))
    tokens = TOKENS[:, : 3 * SEGMENT + 1]  # with the memory tokens behind the last segment: 14
    expected = model.apply(variables, tokens, model.init_cache(BATCH, 4 * SEQ)).logits
    cache, start, logits = model.init_cache(BATCH, tokens.shape[1]), 0, []
    for length in lengths:
        out = model.apply(variables, tokens[:, start : start + length], cache)
        cache, start = out.cache, start + length
        logits.append(out.logits)
    if not lengths:
        logits.append(model.apply(variables, tokens).logits)
    assert_close(np.concatenate(logits, axis=1), expected, rel_rms=1e-12)


def keys_of_blocks(model, variables, tokens, cache, monkeypatch):
    """Returns the dropout key of every call of a block within one call of the model."""
    keys = []

    def spy(module, params, *args, **options):
        if "rngs" in options:
            data = jax.random.key_data(options["rngs"]["dropout"])
            jax.debug.callback(lambda key: keys.append(tuple(key.tolist())), data)
        return call_module(module, params, *args, **options)

    monkeypatch.setattr(cells, "call_module", spy)
    hidden = Decoder._hidden.__wrapped__  # not what is compiled already  # pyright: ignore
    given = (cache, None, None, {"dropout": jax.random.key(1)}, None)

    def run():
        return hidden(model, variables, tokens, *given, train=True, outputs="all")

    jax.block_until_ready(jax.jit(run)())
    jax.effects_barrier()
    monkeypatch.undo()
    return keys


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", MODELS)
def test_no_two_cells_drop_alike(name, call, monkeypatch):
    model, variables = make(name, dropout=0.5, dtype="float32")
    n_before, n_tokens, _ = CALLS[call]
    cache = None if n_before is None else model.init_cache(BATCH, SEQ)
    if n_before:
        cache = model.hidden(variables, TOKENS[:, :n_before], cache).cache
    keys = keys_of_blocks(model, variables, TOKENS[:, :n_tokens], cache, monkeypatch)
    assert len(set(keys)) == len(keys) >= 3 * model.config.n_layers
    if n_before:
        return
    # A segment's key is that of its place in the call, with a cache and without.
    stack_key = jax.random.fold_in(jax.random.key(1), 1)
    for segment in range(n_tokens // SEGMENT):
        for layer in range(model.config.n_layers):
            key = jax.random.fold_in(jax.random.fold_in(stack_key, segment), layer)
            assert tuple(jax.random.key_data(key).tolist()) in keys


@in_float64
@pytest.mark.slow
def test_a_fresh_memory_leaves_the_backbone_alone():
    model, _ = make("armt")
    variables = model.init(jax.random.key(0))
    backbone = build_model(
        {"n_layers": 2, "d_model": 8, "n_heads": 2, "vocab_size": 11, "d_ff": 8, "dtype": "float64"}
    )
    stack = {"0_softmax": variables["params"]["stack"]["0_armt"]}
    params = {**variables["params"], "stack": stack}
    del params["memory"]
    logits = model.apply(variables, TOKENS).logits
    for start in range(0, SEQ, SEGMENT):
        here = slice(start, start + SEGMENT)
        expected = backbone.apply({"params": params}, TOKENS[:, here]).logits
        assert_close(logits[:, here], expected, rel_rms=1e-6)  # parameters are float32


MISTAKES = [
    ({"schedule": "diagonal", "memory": {"kind": "rmt"}}, "memory.kind='rmt'"),
    ({"segment_len": 8}, "memory.segment_len"),
    ({"memory": {"kind": "lstm"}}, "memory.kind must be one of"),
    ({"memory": {"segment_len": 0}}, "memory.segment_len must be positive"),
    ({"memory": {"mixer": "armt"}}, "memory.mixer must be one of"),
    ({"memory": {"n_heads": 3}}, "memory.n_heads must divide memory.d_memory"),
    ({"memory": {"kind": "rmt"}, "pattern": ("armt",)}, "cannot hold 'armt'"),
    (
        {"memory": {"kind": "rmt"}, "pattern": ("armt",), "name": "transformer"},
        "cannot hold 'armt'",
    ),
    (
        {"memory": {"mixer": "lstm"}, "pattern": ("armt",), "name": "transformer"},
        "memory.mixer must",
    ),
    ({"pattern": ("sliding",)}, "pattern must hold 'armt' with name='recurrent_memory'"),
    ({"memory": {"segment_len": 2.5}}, "memory.segment_len must be an integer: got 2.5; write a"),
]


@pytest.mark.parametrize(("fields", "message"), MISTAKES, ids=lambda x: str(x)[:40])
def test_mistakes_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        build_model({"name": "recurrent_memory", "d_model": 64, **fields})


def test_documents_around_a_segment():
    documents = Documents(jnp.array([[3, 3, 4]]), jnp.array([[True, False, True]]))
    around = surround(documents, 2, 1)
    np.testing.assert_array_equal(around.index, [[3, 3, 3, 3, 4, 4]])
    np.testing.assert_array_equal(around.reset, [[False, False, False, False, True, False]])
