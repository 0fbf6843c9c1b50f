"""InAttention against its definition: numpy, loops over documents and layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.decoding import generate
from longctx_jax.decoding.sampling import Sampling
from longctx_jax.models import build_model
from longctx_jax.models.inattention.cache import choose_cache
from longctx_jax.nn.inattention import attention as initial_attention
from longctx_jax.nn.inattention import forms as initial_forms
from longctx_jax.ops.position import relative_bucket
from tests.helpers import assert_close, assert_trees_close, make_normal

BATCH, SEQ, WIDTH, HEADS, VOCAB = 2, 13, 8, 2, 11
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (BATCH, SEQ), np.int32)
DOCUMENTS = np.array([[0] * 4 + [1] * 9, [3] * 10 + [4] * 3], np.int32)
VARIANTS = {
    "default": {},
    "near": {"memory_position": "none", "score_position": "near"},
    "alibi": {"memory_position": "none", "score_position": "alibi"},
    "none": {"memory_position": "none", "score_position": "none"},
    "decoupled": {"score_position": "decoupled", "d_rotary": 4},
    "rotary": {"memory_position": "none", "score_position": "rotary"},
    "narrow": {"d_memory": 6, "score_position": "decoupled", "d_rotary": 2},
    "shared": {"share_projections": True},
    "shared_rotary": {"share_projections": True, "score_position": "rotary"},
}
CASES = [  # variant, cache; one also runs in the fast suite
    ("shared", "kv", False),
    ("default", "embedding", True),
    ("near", "ids", False),
    ("near", "counts", False),
    ("default", "ids", False),
    ("alibi", "counts", False),
    ("default", "kv", False),
    ("decoupled", "embedding", False),
    ("decoupled", "ids", False),
    ("narrow", "embedding", False),
    ("narrow", "kv", False),
    ("rotary", "kv", False),
    ("shared_rotary", "kv", False),
    ("shared", "embedding", False),
    ("alibi", "ids", False),
    ("none", "counts", False),
    ("none", "ids", False),
]
cases = pytest.mark.parametrize(
    ("name", "cache"),
    [
        pytest.param(name, cache, marks=() if is_fast else pytest.mark.slow)
        for name, cache, is_fast in CASES
    ],
)


def describe(name, cache="auto", options=None, **changes):
    """Returns the model of a variant."""
    own = {"n_exact": 3, "max_distance": 8, "cache": cache, **VARIANTS[name], **(options or {})}
    fields = {"n_layers": 2, "d_model": WIDTH, "n_heads": HEADS, "n_kv_heads": 1, "d_ff": 8}
    fields |= {"name": "inattention", "vocab_size": VOCAB, **changes}
    return build_model({**fields, "inattention": own})


def make(name, cache="auto", dtype="float64", **changes):
    """Returns a model, and variables in which every part is at work."""
    model = describe(name, cache, dtype=dtype, **changes)
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: model.init(jax.random.key(0))))
    arrays = [make_normal(i, *leaf.shape, scale=0.5).astype(dtype) for i, leaf in enumerate(leaves)]
    return model, jax.tree.unflatten(tree, arrays)


def rms(x, scale=1.0):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def angles(places, width):
    return places[:, None] * 10_000.0 ** (-np.arange(0, width, 2) / width)


def rotate(x, places):
    """[seq, ..., width], halves rotated by place times frequency."""
    angle = angles(places, x.shape[-1]).reshape(len(x), *[1] * (x.ndim - 2), -1)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], axis=-1
    )


def bias_of(options, table, distance):
    """[heads, seq, keys] by a loop over distances."""
    if options.score_position == "alibi":
        slopes = np.array([2.0 ** (-8 * (h + 1) / HEADS) for h in range(HEADS)])
        return -slopes[:, None, None] * distance
    bias = np.zeros((HEADS, *distance.shape))
    if table is None:
        return bias
    for d in range(distance.max() + 1):
        bucket = d
        if options.score_position == "relative" and d >= options.n_exact:
            share = np.log(d / options.n_exact) / np.log(options.max_distance / options.n_exact)
            bucket = min(options.n_exact + int(share * options.n_exact + 1e-6), table.shape[1] - 1)
        if bucket < table.shape[1]:
            bias[:, distance == d] = table[:, [bucket]]
    return bias


def one_document(model, params, tokens):
    """Returns the logits of one document, [seq, vocab]."""
    config, options, seq = model.config, model.config.inattention, len(tokens)
    table, initial_params = params["embed"]["table"], params["initial"]
    places, x = np.arange(seq), table[tokens]
    if options.memory_position == "sinusoid":
        waves = np.concatenate([np.sin(angles(places, WIDTH)), np.cos(angles(places, WIDTH))], -1)
        x = x + initial_params["rows"]["position_gain"] * waves
    memory = rms(x)
    rows = memory @ initial_params["rows"]["down"]["kernel"] if options.d_memory else memory
    ((_, blocks),) = params["stack"].items()
    distance = places[:, None] - places
    for layer in range(config.n_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        mixer = block["mixer"]
        kernels = initial_params.get("shared", mixer)
        hidden = rms(x, block["mixer_norm"]["scale"])
        query = (hidden @ mixer["query"]["kernel"]).reshape(seq, HEADS, -1)
        source = rows * kernels["gain"]
        key = np.repeat((source @ kernels["key"]["kernel"])[:, None], HEADS, axis=1)
        value = np.repeat((source @ kernels["value"]["kernel"])[:, None], HEADS, axis=1)
        if options.score_position == "rotary":
            query, key = rotate(query, places), rotate(key, places)
        if options.score_position == "decoupled":
            turned = (hidden @ mixer["rotary_query"]["kernel"]).reshape(seq, HEADS, -1)
            query = np.concatenate([query, rotate(turned, places)], axis=-1)
            row = rotate(memory @ initial_params["rows"]["rotary"]["kernel"], places)
            key = np.concatenate([key, np.repeat(row[:, None], HEADS, axis=1)], axis=-1)
        scores = np.einsum("thk,shk->hts", query, key) / np.sqrt(query.shape[-1])
        scores = scores + bias_of(options, mixer.get("relative_bias"), np.maximum(distance, 0))
        weights = np.where(distance >= 0, np.exp(scores - scores.max()), 0.0)
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed = np.einsum("hts,shv->thv", weights, value).reshape(seq, -1)
        x = x + mixed @ mixer["out"]["kernel"]
        hidden = rms(x, block["mlp_norm"]["scale"])
        gate, up, down = (block["mlp"][name]["kernel"] for name in ("gate", "up", "down"))
        hidden = (hidden @ gate) / (1 + np.exp(-(hidden @ gate))) * (hidden @ up)
        x = x + hidden @ down
    return rms(x, params["norm"]["scale"]) @ table.T


@functools.cache
def definition(name):
    """Returns the logits of the packed documents."""
    with jax.enable_x64(True):
        model, variables = make(name)
    logits = np.zeros((BATCH, SEQ, VOCAB))
    for row in range(BATCH):
        for document in np.unique(DOCUMENTS[row]):
            own = np.flatnonzero(DOCUMENTS[row] == document)
            logits[row, own] = one_document(model, variables["params"], TOKENS[row, own])
    return logits


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "decoupled" else pytest.mark.slow)
        for name in VARIANTS
    ],
)
def test_definition(name):
    with jax.enable_x64(True):
        model, variables = make(name)
        logits = model.apply(variables, TOKENS, segment_ids=DOCUMENTS).logits
        at = jnp.array([2, 6, 11])
        picked = model.hidden(variables, TOKENS, segment_ids=DOCUMENTS, at=at).hidden
        hidden = model.hidden(variables, TOKENS, segment_ids=DOCUMENTS).hidden
    assert_close(logits, definition(name), rel_rms=1e-12)
    assert_close(picked, hidden[:, np.asarray(at)], rel_rms=1e-12)


@cases
def test_any_split_and_the_last_token_alone(name, cache):
    """Pieces, single tokens, and prompts whose tokens pass through no layer but the last."""
    expected = definition(name)
    with jax.enable_x64(True):
        model, variables = make(name, cache)

        def feed(lengths, cache, outputs="all"):
            start, logits = 0, []
            for length in lengths:
                piece = slice(start, start + length)
                out = model.hidden(
                    variables, TOKENS[:, piece], cache,
                    segment_ids=DOCUMENTS[:, piece], outputs=outputs,
                )  # fmt: skip
                cache, start = out.cache, start + length
                logits.append(out.hidden @ model.unembedding(variables))
            return np.concatenate(logits, axis=1), cache

        pieces, after = feed((5, 1, 1, 5, 1), model.init_cache(BATCH, SEQ))
        assert_close(pieces, expected, rel_rms=1e-12)
        _, before = feed((5, 5), model.init_cache(BATCH, SEQ), outputs="none")
        piece = slice(10, SEQ)
        last = model.hidden(
            variables, TOKENS[:, piece], before, segment_ids=DOCUMENTS[:, piece], outputs="last"
        )
        logits = last.hidden @ model.unembedding(variables)
    assert_close(logits[:, 0], expected[:, -1], rel_rms=1e-12)
    assert_trees_close(last.cache.carried, after.carried, rel_rms=1e-12)


@pytest.mark.slow
def test_ids_as_codes_of_vector_quantised_attention(monkeypatch):
    """The same numbers from the op of Transformer-VQ, its table full of counts, over documents."""
    calls, op = [], initial_forms.vq_attention

    def counted(query, *rest, **options):
        calls.append(query.shape[1])
        return op(query, *rest, **options)

    monkeypatch.setattr(initial_forms, "vq_attention", counted)
    expected = definition("near")
    with jax.enable_x64(True):
        model, variables = make("near", "counts", options={"implementation": "vq"})
        cache, start, logits = model.init_cache(BATCH, SEQ), 0, []
        for length in (3, 5, 5):
            piece = slice(start, start + length)
            out = model.apply(variables, TOKENS[:, piece], cache, segment_ids=DOCUMENTS[:, piece])
            cache, start = out.cache, start + length
            logits.append(out.logits)
    assert calls == [3, 5]  # once a traced length: layers are one loop
    assert_close(np.concatenate(logits, axis=1), expected, rel_rms=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cache"),
    [("near", "counts"), ("default", "embedding"), ("alibi", "counts"), ("default", "ids")],
)
def test_long_calls_in_segments(name, cache):
    """config.model.segment_len: the same values and gradients, in time linear in the length."""
    with jax.enable_x64(True):
        model, variables = make(name, cache)
        cut, _ = make(name, cache, segment_len=4)

        def loss(params, model):
            out = model.apply({"params": params, "model_state": {}}, TOKENS, segment_ids=DOCUMENTS)
            return jnp.sum(jnp.sin(out.logits)), out.logits

        value = jax.value_and_grad(loss, has_aux=True)
        (_, expected), gradients = value(variables["params"], model)
        (_, logits), cut_gradients = value(variables["params"], cut)
        cached = cut.apply(variables, TOKENS, cut.init_cache(BATCH, SEQ), segment_ids=DOCUMENTS)
    assert_close(logits, expected, rel_rms=1e-12)
    assert_close(cached.logits, expected, rel_rms=1e-12)
    assert_trees_close(cut_gradients, gradients, rel_rms=1e-10)


@pytest.mark.parametrize("cache", ["embedding", pytest.param("ids", marks=pytest.mark.slow)])
def test_a_stream_longer_than_the_cache(cache, monkeypatch):
    """With room for 6 tokens every query sees the last 6, at any split; ids also tile by tile."""
    monkeypatch.setattr("longctx_jax.nn.inattention.forms.TILE_LEN", 4)
    with jax.enable_x64(True):
        model, variables = make("default", cache)

        def feed(lengths):
            cache, start, logits = model.init_cache(BATCH, 6), 0, []
            for length in lengths:
                out = model.apply(variables, TOKENS[:, start : start + length], cache)
                cache, start = out.cache, start + length
                logits.append(out.logits)
            return np.concatenate(logits, axis=1)

        assert_close(feed((1,) * SEQ), feed((9, 1, 3)), rel_rms=1e-12)


def test_a_layer_of_it_is_a_layer_of_the_transformer():
    """In the first layer hidden states are embeddings: with rotary positions nothing differs."""
    with jax.enable_x64(True):
        model, variables = make("rotary", n_layers=1)
        params = variables["params"]
        mixer = dict(params["stack"]["0_inattention"]["mixer"])
        mixer["gain"] = params["stack"]["0_inattention"]["mixer_norm"]["scale"]
        block = params["stack"]["0_inattention"] | {"mixer": mixer}
        ours = {**params, "stack": {"0_inattention": block}}
        logits = model.apply({"params": ours}, TOKENS, segment_ids=DOCUMENTS).logits
        plain = {name: leaf for name, leaf in mixer.items() if name != "gain"}
        twin = {
            "embed": params["embed"],
            "norm": params["norm"],
            "stack": {"0_softmax": block | {"mixer": plain}},
        }
        fields = {"n_layers": 1, "d_model": WIDTH, "n_heads": HEADS, "n_kv_heads": 1, "d_ff": 8}
        transformer = build_model({**fields, "vocab_size": VOCAB, "dtype": "float64"})
        expected = transformer.apply({"params": twin}, TOKENS, segment_ids=DOCUMENTS).logits
    assert_close(logits, expected, rel_rms=1e-12)


def test_without_positions_the_past_is_a_set():
    with jax.enable_x64(True):
        changed = {}
        for name in ("none", "near"):
            model, variables = make(name)
            shuffled = TOKENS.copy()
            shuffled[:, :-1] = TOKENS[:, -2::-1]
            before, after = (model.apply(variables, x).logits[:, -1] for x in (TOKENS, shuffled))
            changed[name] = np.abs(before - after).max()
    assert changed["none"] < 1e-12 < 1e-3 < changed["near"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_lower_precision(dtype, tolerance):
    """Rows, absorbed, against keys and values: 1e-5 and 0.1 as the note of the paper asks."""
    model, variables = make("default", "embedding", dtype)
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)
    expected = model.apply(variables, TOKENS).logits
    cache, logits = model.init_cache(BATCH, SEQ), []
    for t in range(SEQ):
        out = model.apply(variables, TOKENS[:, t : t + 1], cache)
        cache = out.cache
        logits.append(out.logits)
    assert_close(np.concatenate(logits, axis=1), expected, rel_rms=tolerance)


def test_learned_biases_start_as_slopes():
    """Every bucket of 2 heads holds the slope times its smallest distance; near ends at 0."""
    table = initial_attention.slanted(2, 4, 64)
    slopes = np.array([2.0**-4, 2.0**-8])
    buckets = np.asarray(relative_bucket(jnp.arange(200), 8, 64))
    first = np.array([np.flatnonzero(buckets == b)[0] for b in range(8)])
    assert np.array_equal(table[:, :4], -slopes[:, None] * np.arange(4))
    assert np.all(np.abs(table[0] / -slopes[0] - first) < 1)
    near = initial_attention.slanted(2, 4, 0)
    assert_close(near, slopes[:, None] * np.array([4, 3, 2, 1]), rel_rms=1e-15)


def test_cache_bytes():
    """Two streams of 100 tokens; beside the formula, a place of two integers a stream."""
    batch, n, place = 2, 100, 2 * 4

    def of(name, cache, **changes):
        fields = {"n_layers": 5, **changes}
        model = describe(name, cache, **fields)
        shapes = jax.eval_shape(lambda: model.init_cache(batch, n))
        leaves = jax.tree.leaves((shapes.layers, shapes.carried))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / batch

    assert of("default", "embedding", dtype="bfloat16") == 2 * WIDTH * n + place
    assert of("narrow", "embedding") == 4 * (6 + 2) * n + place
    assert of("default", "ids") == n + place
    assert of("default", "ids", vocab_size=300) == 2 * n + place
    assert of("near", "counts") == 3 + 4 * VOCAB + place
    assert of("alibi", "counts") == 4 * HEADS * VOCAB + place
    leaves = jax.tree.leaves(jax.eval_shape(lambda: describe("none").init_cache(batch, n)))
    assert all(leaf.size for leaf in leaves)  # checkpoints refuse arrays of size 0
    marks = 2 * 4 * n + 4  # a slot's position and document, and the stream's position
    width = WIDTH // HEADS
    assert of("default", "kv") == 5 * (4 * 2 * width * n + marks) + place
    assert of("shared", "kv") == 4 * 2 * width * n + marks + place


def test_auto_takes_the_smallest_cache_that_saves_work():
    def choice(name, max_len, **changes):
        return choose_cache(describe(name, **changes).config, max_len)

    assert choice("near", 4096) == "counts"
    assert choice("near", 4096, vocab_size=32_000) == "embedding"
    assert choice("near", 2**20, vocab_size=32_000) == "counts"
    assert choice("default", 4096) == "embedding"
    assert choice("rotary", 4096) == "kv"
    assert choice("default", 4096, n_layers=1) == "kv"  # one layer's keys are as narrow as its rows


@pytest.mark.slow
def test_ragged_prompts_continue_as_alone():
    model, variables = make("default", "embedding", "float32")
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)
    prompts = [TOKENS[0, :3], TOKENS[1, :7]]
    options = {"max_new_tokens": 4, "sampling": Sampling(temperature=0.0), "prefill_len": 3}
    together = generate(model, variables, prompts, **options)
    for row, prompt in enumerate(prompts):
        assert np.array_equal(together[row], generate(model, variables, [prompt], **options)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "counts"}, "cache='counts' cannot be: memory_position='sinusoid' makes equal"),
        (
            {"cache": "counts", "memory_position": "none"},
            "score_position='relative' tells old equal tokens apart",
        ),
        ({"cache": "ids", "score_position": "rotary"}, "turns keys after they are projected"),
        ({"max_distance": 3}, "max_distance must exceed n_exact"),
        ({"score_position": "decoupled", "d_rotary": 3}, "d_rotary must be even: got 3; use 4"),
        ({"implementation": "vq"}, "implementation='vq' takes ids for codes"),
        ({"implementation": "banded"}, "config.model.inattention.implementation must be one of"),
        ({"score_position": "rope"}, "config.model.inattention.score_position must be one of"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        describe("default", options=options)


def test_impossible_combinations():
    for changes, message in (
        ({"mlp": "rwkv"}, "config.model.mlp='rwkv' reads what the token before became"),
        ({"schedule": "diagonal"}, "config.model.schedule must be 'layerwise' with inattention"),
        ({"pattern": ("softmax",)}, "config.model.pattern must be one of"),
        ({"d_model": 9, "n_heads": 3}, "d_model must be even with inattention.memory_position"),
    ):
        with pytest.raises(ValueError, match=message):
            describe("default", **changes)
    model, variables = make("default", dtype="float32")
    with pytest.raises(ValueError, match="outputs must be one of"):
        model.hidden(variables, TOKENS, outputs="first")
