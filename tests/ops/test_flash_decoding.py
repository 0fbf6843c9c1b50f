"""The split-key kernel for one query: numerics in the interpreter, lowering, choice, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from longctx_jax.ops import cache_attention, flash_decoding
from longctx_jax.ops.attention import Keys, attention_partial
from longctx_jax.ops.cache_attention import Cached, Facts, attend_cache
from longctx_jax.ops.dispatch import Implementation
from longctx_jax.ops.flash_decoding import HIDDEN, Tiling, attend, chunks
from longctx_jax.ops.position import DistanceBias
from tests.helpers import (
    assert_close,
    assert_trees_close,
    in_float64,
    lower_for_cuda,
    make_normal,
    run_on_devices,
)

TARGET = "__gpu$xla.gpu.triton"
TILES = Tiling(heads=16, keys=16, n_warps=4, n_stages=2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A call; d_value 0 = values are rows of their own width, else the first columns of keys."""

    batch: int = 2
    kv_heads: int = 2
    group: int = 3
    keys: int = 75
    d_key: int = 32
    d_value: int = 48
    is_shared: bool = False
    bias: str = ""  # "buckets", "near" or "slopes"
    layers: int = 0
    dtype: str = "float32"


CASES = {
    "everything": Case(kv_heads=1, group=20, d_key=48, d_value=32, is_shared=True, bias="buckets"),
    "ring": Case(layers=2),
    "near": Case(kv_heads=1, is_shared=True, d_key=48, bias="near"),
    "slopes": Case(batch=1, keys=64, bias="slopes"),
    "one_key": Case(batch=1, kv_heads=1, keys=1),
    "bfloat16": Case(batch=1, bias="near", dtype="bfloat16", d_value=32),
}
FAST = ("everything",)


@pytest.fixture
def small_tiles(monkeypatch):
    """Makes a few keys span several tiles and splits, one of which is left without keys."""
    monkeypatch.setattr(flash_decoding, "tiling", lambda *_: TILES)
    monkeypatch.setattr(flash_decoding, "PROGRAMS", 12)


def make_call(case):
    """Returns query, key, value, the distance of each key (some hidden), and the bias."""
    heads = case.kv_heads * case.group
    stacked = (case.layers,) if case.layers else ()
    shape = (*stacked, case.batch, case.kv_heads, case.keys)
    query = make_normal(0, case.batch, heads, case.d_key)
    key = make_normal(1, *shape, case.d_key)
    value = None if case.is_shared else make_normal(2, *shape, case.d_value)
    rng = np.random.default_rng(3)
    distance = np.stack([rng.permutation(case.keys) for _ in range(case.batch)])
    if case.keys > 20:  # whole tiles at both ends, and keys in between, are not seen
        distance[rng.random(distance.shape) < 0.3] = HIDDEN
        distance[:, :17] = distance[-1, -20:] = HIDDEN
    bias = {
        "": None,
        "buckets": DistanceBias(make_normal(4, heads, 8), 32),
        "near": DistanceBias(make_normal(4, heads, 8), 0),
        "slopes": DistanceBias(slopes=np.abs(make_normal(4, heads))),
    }[case.bias]
    return query, key, value, distance.astype(np.int32), bias


def cast(tree, dtype):
    """Returns the tree with its arrays of real numbers as jax arrays of this dtype."""

    def change(x):
        is_real = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
        return jnp.asarray(x, dtype) if is_real else jnp.asarray(x)

    return jax.tree.map(lambda x: change(x) if isinstance(x, (np.ndarray, jax.Array)) else x, tree)


def definition(case, query, key, value, distance, bias):
    """The same by dense attention, in the precision of its arguments."""
    if case.layers:
        key, value = key[1], value[1]
    key = jnp.swapaxes(key, 1, 2)
    value = key[..., : case.d_value] if value is None else jnp.swapaxes(value, 1, 2)
    now = jnp.full((case.batch, 1), case.keys, jnp.int32)
    where = Keys(now, jnp.where(distance == HIDDEN, -1, now - distance))
    options = {"relative_bias": bias, "scale": 0.3, "implementation": "dense"}
    out, log_normalizer = attention_partial(query[:, None], key, value, where, **options)
    return out[:, 0], log_normalizer[:, 0]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES]
)
def test_kernel_is_dense_attention(name, small_tiles):
    case = CASES[name]
    arrays = cast(make_call(case), case.dtype)
    exact = in_float64(lambda: definition(case, *cast(arrays, np.float64)))()
    layer = jnp.asarray(1) if case.layers else None
    options = {"scale": 0.3, "d_value": case.d_value, "layer": layer, "interpret": True}
    found = attend(*arrays, **options)
    tolerance = 1e-6 if case.dtype == "float32" else 5e-3  # seen: 2e-7 and 2e-3
    for actual, expected in zip(found, exact, strict=True):
        assert_close(actual, expected, rel_rms=tolerance)


@pytest.mark.slow
def test_nothing_visible_is_a_neutral_result(small_tiles):
    case = Case(batch=1, kv_heads=1, keys=20)
    query, key, value, distance, _ = cast(make_call(case), np.float32)
    found = attend(
        query, key, value, jnp.full_like(distance, HIDDEN), None,
        scale=1.0, d_value=case.d_value, interpret=True,
    )  # fmt: skip
    assert np.all(np.asarray(found[0]) == 0.0)
    assert np.all(np.asarray(found[1]) == -np.inf)


def test_only_tiles_with_visible_keys_are_read():
    distance = jnp.full((3, 70), HIDDEN).at[0, 17:40].set(1).at[1, 69].set(1)
    tiles = flash_decoding._visible_tiles(distance, 16)
    assert tiles.tolist()[:2] == [[1, 3], [4, 5]]
    first, end = tiles.tolist()[2]
    assert first >= end


@pytest.mark.parametrize(("end", "widths"), [(576, [512, 64]), (48, [32, 16]), (2048, [512] * 4)])
def test_chunks_are_powers_of_two_side_by_side(end, widths):
    found = chunks(0, end)
    assert [width for _, width in found] == widths
    assert [start for start, _ in found] == np.cumsum([0, *widths[:-1]]).tolist()


@pytest.fixture
def in_interpreter(monkeypatch, small_tiles):
    """Makes "auto" take the kernel for every single query, in the interpreter."""
    calls = []

    def run(*args, **options):
        calls.append(args[1].shape)
        return attend(*args, **options, interpret=True)

    monkeypatch.setattr(flash_decoding, "attend", run)
    kernel, xla = cache_attention.IMPLEMENTATIONS

    def unsupported(facts):
        return "" if facts.query_len == 1 else "takes one query"

    always = Implementation(kernel.name, kernel.run, unsupported)
    monkeypatch.setattr(cache_attention, "IMPLEMENTATIONS", (always, xla))
    return calls


def test_gradients_are_those_of_plain_attention(in_interpreter):
    case = Case(batch=1, kv_heads=1, group=2, keys=20, d_key=16, d_value=16, bias="near")
    query, key, value, distance, bias = cast(make_call(case), np.float32)
    now = jnp.full((1, 1), case.keys, jnp.int32)
    where = Keys(now, jnp.where(distance == HIDDEN, -1, now - distance))

    def loss(arrays, implementation):
        query, key, value, table = arrays
        found = attend_cache(
            query[:, None],
            Cached(key, value, case.d_value),
            where,
            relative_bias=DistanceBias(table, 0),
            implementation=implementation,
        )
        return jnp.sum(jnp.sin(found.out)) + jnp.sum(found.log_normalizer), found

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    arrays = (query, key, value, bias.table)
    assert_trees_close(run(arrays, "pallas_triton"), run(arrays, "xla"), rel_rms=2e-6)


MODELS = {
    "ring": {"n_kv_heads": 2},
    "windows": {"pattern": ("softmax", "sliding"), "sliding": {"window_len": 5}},
    "relative": {"n_kv_heads": 1, "softmax": {"position": "relative"}},
    "keys": {"name": "inattention", "inattention": {"cache": "kv"}},
    "rows": {"name": "inattention", "inattention": {"cache": "embedding"}},
    "decoupled": {
        "name": "inattention",
        "inattention": {"cache": "embedding", "score_position": "decoupled", "d_rotary": 16},
    },
    "staggered": {
        "name": "stagformer",
        "stagformer": {"cross_cache": "memory", "cross_position": "none"},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_models_decode_with_it(name, in_interpreter):
    """Two layers, a prompt of 7 and three tokens: the kernel reads its layer of the whole ring."""
    fields = {"vocab_size": 11, "n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 16}
    model = build_model(fields | MODELS[name])
    variables = model.init(jax.random.key(0))
    variables = jax.tree.map(  # biases start at 0
        lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), variables
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 10), 0, 11)
    whole = model.apply(variables, tokens).logits
    cache = model.apply(variables, tokens[:, :7], model.init_cache(2, 12)).cache
    in_interpreter.clear()
    for t in range(7, 10):
        out = model.apply(variables, tokens[:, t : t + 1], cache)
        assert_close(out.logits[:, 0], whole[:, t], rel_rms=1e-5)
        cache = out.cache
    assert in_interpreter
    if name in ("ring", "keys"):
        heads = model.config.n_kv_heads
        assert set(in_interpreter) == {(2, 2, heads, 12, 8)}


@pytest.mark.parametrize(
    ("group", "d_key", "d_value", "is_shared"),
    [(4, 64, 64, False), (32, 576, 512, True), (32, 2048, 2048, True)],
    ids=["gqa", "narrow", "wide"],
)
def test_lowers_for_cuda(group, d_key, d_value, is_shared):
    def array(*shape, dtype="bfloat16"):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    value = None if is_shared else array(16, 1, 2, 5000, d_value)
    arguments = (
        array(1, 2 * group, d_key),
        array(16, 1, 2, 5000, d_key),
        value,
        array(1, 5000, dtype="int32"),
        array(2 * group, 32, dtype="float32"),
        array(dtype="int32"),
    )

    def run(query, key, value, distance, table, layer):
        options = {"scale": 0.1, "d_value": d_value, "layer": layer}
        return attend(query, key, value, distance, DistanceBias(table), **options)

    assert lower_for_cuda(run, *arguments).count(TARGET) == 1


def facts(**changes):
    given = {"platform": "gpu", "dtype": "bfloat16", "capability": "9.0", "query_len": 1}
    given |= {"key_len": 4096, "d_key": 64, "d_value": 64}
    return Facts(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "cpu"}, "jax runs on cpu"),
        ({"dtype": "float32"}, "not float32"),
        ({"capability": "8.0"}, "not 8.0"),
        ({"query_len": 2}, "one query, not 2"),
        ({"d_key": 40}, "multiples of 16: 40"),
        ({"d_key": 4096, "d_value": 4096}, "do not fit the registers: 4096"),
        ({"d_key": 4096}, "up to 2112 numbers: 4096"),
        ({"d_key": 576, "d_value": 512}, ""),
        ({"d_key": 2112, "d_value": 2048}, ""),
    ],
    ids=["cpu", "float32", "old", "two", "odd", "wide", "wide_keys", "fine", "rotary"],
)
def test_unsupported(changes, reason):
    said = flash_decoding.unsupported(facts(**changes))
    assert reason in said and bool(said) == bool(reason)


def test_few_keys_and_other_machines_are_left_to_xla():
    kernel, xla = cache_attention.IMPLEMENTATIONS
    assert "64 keys are too few" in kernel.unattractive(facts(key_len=64))
    assert not kernel.unattractive(facts()) and not kernel.unattractive(facts(d_key=576))
    assert "spill" in kernel.unattractive(facts(d_key=720))
    assert not xla.unsupported(facts(platform="cpu")) and not xla.unattractive(facts())
    x = jnp.ones((1, 1, 1, 16))
    where = Keys(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32))
    with pytest.raises(NotImplementedError, match="'pallas_triton' cannot run here: a GPU kernel"):
        attend_cache(x, Cached(x, x, 16), where, implementation="pallas_triton")
    with pytest.raises(ValueError, match="implementation must be one of"):
        attend_cache(x, Cached(x, x, 16), where, implementation="dense")


def check_mesh():
    """On a mesh each of four devices runs half of the rows and half of the key heads."""
    flash_decoding.tiling = lambda *_: TILES
    case = Case(bias="near", layers=2)
    arrays = cast(make_call(case), np.float32)
    options = {"scale": 0.3, "d_value": case.d_value, "layer": jnp.asarray(1), "interpret": True}
    seen = []
    inner = flash_decoding._attend

    def spy(arrays, **options):
        seen.append(arrays["key"].shape)
        return inner(arrays, **options)

    flash_decoding._attend = spy
    expected = attend(*arrays, **options)
    axes = (jax.sharding.AxisType.Auto,) * 2
    with jax.set_mesh(jax.make_mesh((2, 2), ("data", "model"), axis_types=axes)):
        found = jax.jit(lambda: attend(*arrays, **options))()
    assert seen == [(2, 2, 2, 75, 32), (2, 1, 1, 75, 32)]
    assert_trees_close(found, expected, rel_rms=1e-6)


@pytest.mark.slow
def test_on_a_mesh():
    run_on_devices("from tests.ops.test_flash_decoding import check_mesh; check_mesh()", 4)
