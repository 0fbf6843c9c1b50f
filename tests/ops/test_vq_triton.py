"""The Triton kernels of vector-quantised attention: numerics in the interpreter, and lowering."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops.dispatch import Implementation
from longctx_jax.ops.vq import blocks as plain
from longctx_jax.ops.vq import codebook as plain_codebook
from longctx_jax.ops.vq import pallas_triton, pallas_triton_search, pallas_triton_table, select
from longctx_jax.ops.vq.blocks import Blocks, Constants, Rules
from longctx_jax.ops.vq.pallas_triton_search import SearchTiling
from longctx_jax.ops.vq.pallas_triton_table import TableTiling
from longctx_jax.ops.vq.pallas_triton_tiles import Tiling
from longctx_jax.ops.vq.table import NO_DOCUMENT, Table, tables_before_blocks
from tests.helpers import assert_close, assert_trees_close, lower_for_cuda, make_normal


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of `attend_blocks`; distances 0 = no bias."""

    n_blocks: int = 3
    batch: int = 2
    kv_heads: int = 2
    group: int = 1
    block: int = 16
    before: int = 32
    window_len: int = 20
    d_key: int = 16
    d_value: int = 16
    codes: int = 24
    distances: int = 21
    documents: bool = True
    use_table: bool = True
    grad_through_cache: bool = True
    dtype: str = "float32"
    tiles: Tiling = Tiling(16, 16, 16, 4, 2)

    @property
    def rules(self):
        return Rules(self.window_len, 0.3, self.use_table, self.grad_through_cache)


CASES = {
    "heads": Case(codes=32),
    "group": Case(kv_heads=1, group=3),
    "split_values": Case(kv_heads=1, d_value=48, codes=16),
    "everything": Case(
        kv_heads=1, group=2, block=13, before=26, d_key=20, d_value=40, codes=21, distances=9
    ),
    "window": Case(block=13, before=26, use_table=False),
    "window_of_blocks": Case(
        n_blocks=5, block=8, before=8, window_len=5, distances=6, use_table=False, d_value=40
    ),
    "local_gradients": Case(block=13, before=26, grad_through_cache=False, d_value=40),
    "no_bias": Case(distances=0, documents=False),
    "one_block": Case(n_blocks=1, block=50, before=20),
    "nothing_before": Case(n_blocks=1, block=50, before=0),
    "short_blocks": Case(
        n_blocks=5, block=5, before=10, window_len=7, distances=8, documents=False
    ),
    "wide_rows": Case(block=40, before=40, d_value=64, tiles=Tiling(32, 16, 32, 4, 2)),
    "bfloat16": Case(block=20, before=20, group=2, kv_heads=1, dtype="bfloat16"),
}
FAST = ("everything",)


def make_call(case):
    """Returns blocks and constants, and the gradient of the result.

    Documents change in mid block, slots before the first token are empty, the last three queries
    are padding, some codes are empty and one head's table is empty altogether.
    """
    shape = case.n_blocks, case.batch, case.kv_heads
    rows, n_keys = (*shape, case.group, case.block), case.before + case.n_blocks * case.block
    keys = (case.batch, case.kv_heads, n_keys)
    shapes = [(*rows, case.d_key), (*keys, case.d_key), (*keys, case.d_value)]
    shapes += [(*rows, case.distances), (case.kv_heads, case.codes, case.d_key)]
    query, key, value, bias, codebook = (
        jnp.asarray(make_normal(i, *s), case.dtype) for i, s in enumerate(shapes)
    )
    mean = jnp.float32(make_normal(5, *shape, case.codes, case.d_value))
    d_out = jnp.asarray(make_normal(6, *rows, case.d_value), case.dtype)

    random = np.random.default_rng(0)
    count = random.integers(0, 4, (*shape, case.codes))
    count[-1, 0, 0] = 0
    n_tokens = case.n_blocks * case.block
    document = np.zeros((case.batch, n_tokens), int)
    if case.documents:
        document = np.sort(random.integers(0, 3, (case.batch, n_tokens)), axis=1)
    of_keys = np.full((case.batch, n_keys), NO_DOCUMENT)
    of_keys[:, case.before // 2 : case.before] = document[:, :1]
    of_keys[:, case.before :] = document
    of_keys[:, -3:] = NO_DOCUMENT
    of_rows = np.moveaxis(document.reshape(case.batch, case.n_blocks, case.block), 1, 0).copy()
    of_rows[-1, :, -3:] = -2
    of_tables = of_rows[:, :, 0].copy()
    of_tables[0, 0] = NO_DOCUMENT
    integers = (jnp.int32(x) for x in (count, of_rows, of_keys, of_tables))
    blocks = Blocks(query, key, value, bias if case.distances else None, mean)
    return blocks, Constants(codebook, *integers), d_out


def pull(attend, rules, blocks, constants, d_out):
    out, pull = jax.vjp(lambda blocks: attend(rules, blocks, constants), blocks)
    return out, pull(d_out)[0]


interpreted = functools.partial(pallas_triton.attend_blocks, interpret=True)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in CASES]
)
def test_attention_and_its_gradients(name, monkeypatch):
    case = CASES[name]
    monkeypatch.setattr(pallas_triton, "tiling", lambda *facts: case.tiles)
    arrays = make_call(case)
    actual = jax.jit(functools.partial(pull, interpreted, case.rules))(*arrays)
    expected = jax.jit(functools.partial(pull, plain.attend_blocks, case.rules))(*arrays)
    types_of = [jax.tree.map(lambda x: x.dtype, tree) for tree in (actual, expected)]
    assert types_of[0] == types_of[1]
    is_narrow = case.dtype == "bfloat16"
    # seen: 1.5e-7 and 4e-7; in bfloat16 1.1e-3 and 1.6e-3
    assert_close(actual[0], expected[0], rel_rms=4e-3 if is_narrow else 1e-6)
    assert_trees_close(actual[1], expected[1], rel_rms=6e-3 if is_narrow else 2e-6)


@pytest.mark.slow
def test_attention_with_large_scores(monkeypatch):
    """A bias of 1e4 leaves one key, and empty codes never count."""
    case = CASES["heads"]
    monkeypatch.setattr(pallas_triton, "tiling", lambda *facts: case.tiles)
    blocks, constants, d_out = make_call(case)
    blocks = blocks._replace(bias=1e4 * blocks.bias, query=100 * blocks.query)
    constants = constants._replace(count=constants.count.at[:, :, :, ::2].set(0))
    actual = jax.jit(functools.partial(pull, interpreted, case.rules))(blocks, constants, d_out)
    expected = jax.jit(functools.partial(pull, plain.attend_blocks, case.rules))(
        blocks, constants, d_out
    )
    assert_close(actual[0], expected[0], rel_rms=1e-4)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(actual))


@pytest.mark.slow
def test_end_to_end(monkeypatch):
    """Through the front door: every kernel at once, split into two calls."""
    tiles = Tiling(16, 16, 16, 4, 2)
    monkeypatch.setattr(pallas_triton, "tiling", lambda *facts: tiles)
    search = functools.partial(pallas_triton.search_codes, interpret=True)
    query, key, value = (jnp.float32(make_normal(i, 1, 40, h, 16)) for i, h in enumerate((2, 1, 1)))
    codebook = jnp.float32(make_normal(3, 1, 8, 16))
    bias = jnp.float32(make_normal(4, 1, 40, 2, 6))
    documents = jnp.int32([[0] * 19 + [1] * 21])

    def run(query, key, value, bias):
        options = {"window_len": 6, "block_len": 8}
        first, last = slice(0, 26), slice(26, 40)
        outs, state = [], None
        for part in (first, last):
            result = select.vq_attention(
                *(x[:, part] for x in (query, key, value)),
                codebook,
                state,
                relative_bias=bias[:, part],
                documents=documents[:, part],
                **options,
            )
            state = result.state
            outs.append(result.out)
        return jnp.concatenate(outs, axis=1)

    def gradients():
        def loss(*arrays):
            out = run(*arrays)
            return jnp.sum(jnp.sin(out)), out

        whole = jax.value_and_grad(loss, argnums=range(4), has_aux=True)
        return jax.jit(whole)(query, key, value, bias)

    expected = gradients()
    calls = []

    def attend(*args):
        calls.append(args)
        return interpreted(*args)

    monkeypatch.setattr(select, "ATTENTION", (Implementation("kernel", attend),))
    monkeypatch.setattr(select, "SEARCHES", (Implementation("kernel", search),))
    assert_trees_close(gradients(), expected, rel_rms=2e-6)
    assert len(calls) == 2


# shape of vectors, codes, dtype
SEARCHES = {
    "odd": ((2, 19, 3, 20), 21, "float32"),
    "tiles": ((32, 1, 16), 32, "float32"),
    "one": ((1, 1, 16), 1, "float32"),
    "bfloat16": ((2, 19, 3, 20), 21, "bfloat16"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "odd" else pytest.mark.slow) for n in SEARCHES],
)
def test_search(name):
    shape, codes, dtype = SEARCHES[name]
    codebook = jnp.float32(make_normal(0, shape[-2], codes, shape[-1]))
    vectors = jnp.asarray(make_normal(1, *shape), dtype)
    if codes > 20:  # vectors as near to code 3 as to 19, of its lane, and 20, of another
        codebook = codebook.at[:, jnp.array([19, 20])].set(codebook[:, 3:4])
        vectors = vectors.at[0].set(codebook[:, 3].astype(dtype))
    search = functools.partial(
        pallas_triton.search_codes_and_errors, interpret=True, tiles=SearchTiling(16, 8, 4, 2)
    )
    actual, error = jax.jit(search)(vectors, codebook)
    expected = plain_codebook.search_codes(vectors, codebook)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
    exact = plain_codebook.quantize(vectors, codebook, expected).squared_error
    assert_close(error, exact, rel_rms=1e-6, max_abs=2e-5)  # seen: 2e-7, 8e-6
    assert codes <= 20 or bool(jnp.all(actual[0] == 3))


def test_search_of_what_is_no_number_stays_in_range():
    vectors = jnp.full((16, 1, 16), jnp.nan)
    codes = pallas_triton.search_codes(vectors, jnp.ones((1, 8, 16)), interpret=True)
    assert bool(jnp.all((codes >= 0) & (codes < 8)))


def test_split_adds_up():
    x = jnp.float32(make_normal(0, 1000) * np.exp(make_normal(1, 1000, scale=5.0)))
    pieces = jax.jit(pallas_triton_search.split)(x)
    total = sum(np.asarray(piece, np.float64) for piece in pieces)
    np.testing.assert_array_equal(total, np.asarray(x, np.float64))


# blocks, batch, heads, block, value, codes, dtype
TABLES = {
    "odd": (3, 2, 2, 13, 40, 21, "float32"),
    "tiles": (4, 2, 1, 16, 16, 32, "float32"),
    "bfloat16": (3, 2, 2, 16, 48, 24, "bfloat16"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "odd" else pytest.mark.slow) for n in TABLES]
)
def test_tables(name):
    n_blocks, batch, heads, block, d_value, n_codes, dtype = TABLES[name]
    random = np.random.default_rng(0)
    documents = np.sort(random.integers(0, 4, (batch, n_blocks * block)), axis=1)
    documents[0, :5] = NO_DOCUMENT
    documents = np.moveaxis(documents.reshape(batch, n_blocks, block), 1, 0)
    codes = random.integers(0, n_codes - 3, (n_blocks, batch, heads, block))
    count = jnp.int32(random.integers(0, 3, (batch, heads, n_codes)))
    mean = jnp.float32(make_normal(0, batch, heads, n_codes, d_value))
    value = jnp.asarray(make_normal(1, n_blocks, batch, heads, block, d_value), dtype)
    d_mean = jnp.float32(make_normal(2, n_blocks + 1, batch, heads, n_codes, d_value))
    document = jnp.int32([NO_DOCUMENT, 0])

    def run(build, mean, value):
        def means(mean, value):
            table = build(
                Table(mean, count, document), jnp.int32(codes), value, jnp.int32(documents)
            )
            return table.mean, table

        _, pull, table = jax.vjp(means, mean, value, has_aux=True)
        return table, pull(d_mean)

    tiles = TableTiling(16, 16, 8, 4, 2)
    kernel = functools.partial(pallas_triton.tables_before_blocks, interpret=True, tiles=tiles)
    actual = jax.jit(functools.partial(run, kernel))(mean, value)
    expected = jax.jit(functools.partial(run, tables_before_blocks))(mean, value)
    assert jax.tree.map(lambda x: x.dtype, actual) == jax.tree.map(lambda x: x.dtype, expected)
    assert_trees_close(actual, expected, rel_rms=3e-7)  # seen: 2e-8
    np.testing.assert_array_equal(actual[0].count, expected[0].count)


TARGET = "__gpu$xla.gpu.triton"


@pytest.mark.parametrize(
    ("dtype", "d_key", "d_value", "has_bias", "block"),
    [
        pytest.param("bfloat16", 64, 64, True, 512, marks=pytest.mark.slow),
        ("bfloat16", 128, 1536, True, 512),
        pytest.param("bfloat16", 128, 128, False, 500, marks=pytest.mark.slow),
        pytest.param("bfloat16", 256, 256, True, 512, marks=pytest.mark.slow),
        ("float32", 128, 128, True, 500),
        pytest.param("float32", 20, 40, True, 16, marks=pytest.mark.slow),
    ],
)
def test_attention_lowers_for_cuda(dtype, d_key, d_value, has_bias, block):
    case = Case(
        block=block,
        before=512 + -512 % block,
        window_len=512,
        d_key=d_key,
        d_value=d_value,
        codes=512,
        distances=513 if has_bias else 0,
        dtype=dtype,
    )
    shapes = jax.eval_shape(lambda: make_call(case))
    run = functools.partial(pull, pallas_triton.attend_blocks, case.rules)
    n_kernels = 4 if max(d_value, 16) <= (128 if dtype == "bfloat16" else 64) else 5
    assert lower_for_cuda(run, *shapes).count(TARGET) == n_kernels


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_search_and_tables_lower_for_cuda(dtype):
    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    vectors, codebook = array(1000, 2, 100), array(2, 500, 100, dtype=jnp.float32)
    assert lower_for_cuda(pallas_triton.search_codes, vectors, codebook).count(TARGET) == 1
    integer = functools.partial(array, dtype=jnp.int32)
    table = Table(array(2, 3, 500, 1536, dtype=jnp.float32), integer(2, 3, 500), integer(2))
    arguments = integer(4, 2, 3, 500), array(4, 2, 3, 500, 1536), integer(4, 2, 500)
    text = lower_for_cuda(pallas_triton.tables_before_blocks, table, *arguments)
    assert text.count(TARGET) == 1


def facts(**changes):
    given = {"platform": "gpu", "dtype": "bfloat16", "capability": "9.0", "d_key": 64}
    return types.SimpleNamespace(**(given | {"d_value": 64} | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"platform": "cpu"}, "jax runs on cpu"),
        ({"dtype": "float16"}, "not float16"),
        ({"capability": "8.0"}, "not 8.0"),
        ({"d_key": 512}, "wider than 256"),
        ({"dtype": "float32", "d_key": 256}, "wider than 128"),
        ({"d_value": 4096}, ""),
        ({"dtype": "float32"}, ""),
    ],
    ids=["cpu", "half", "old", "wide", "wide32", "values", "fine"],
)
@pytest.mark.parametrize("check", ["attention_unsupported", "search_unsupported"])
def test_unsupported(check, changes, reason):
    said = getattr(pallas_triton, check)(facts(**changes))
    assert reason in said and bool(said) == bool(reason)


def test_full_precision_is_declined():
    with jax.default_matmul_precision("highest"):
        assert "precision is highest" in pallas_triton.attention_unsupported(facts(dtype="float32"))
        assert not pallas_triton.attention_unsupported(facts())


@pytest.mark.parametrize("kernel", ["forward", "query_gradient", "key_gradient", "value_gradient"])
@pytest.mark.parametrize("d_value", [16, 128, 384, 1536, 4096])
def test_tiles_divide_the_values(kernel, d_value):
    for dtype in ("bfloat16", "float32"):
        tiles = pallas_triton.tiling(kernel, 128, d_value, dtype, 40)
        assert d_value % tiles.value == 0
        assert tiles.rows <= 64
        assert d_value % pallas_triton_table.tiling(d_value, dtype).value == 0
