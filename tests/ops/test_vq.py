"""Vector-quantised attention: every form against the definition, any split; table and state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx_jax.ops.vq import init_vq_state, nearest_code, renewed, vq_attention
from longctx_jax.ops.vq.codebook import quantize
from longctx_jax.ops.vq.reference import vq_attention_reference
from longctx_jax.ops.vq.table import (
    Table,
    empty_table,
    file_token,
    file_tokens,
    merge_tables,
    tables_before_blocks,
)
from tests.helpers import assert_close, assert_trees_close, in_float64, make_normal

BATCH, SEQ, HEADS, KV_HEADS, KEY, VALUE, CODES, WINDOW = 2, 23, 4, 2, 4, 6, 5, 5
REDUCTIONS = ("serial", "matmul", "associative")  # test_vq_triton.py has the kernel
DOCUMENTS = np.array([[0] * 2 + [1] * 9 + [2] + [3] * 11, [0] * 10 + [1] * 13], np.int32)


def make_inputs(dtype=np.float64, heads=HEADS, kv_heads=KV_HEADS, seq=SEQ, codes=CODES):
    """Returns query, key, value, bias, codebook; codes are well apart, so none is nearly chosen."""
    shapes = [
        (BATCH, seq, heads, KEY),
        (BATCH, seq, kv_heads, KEY),
        (BATCH, seq, kv_heads, VALUE),
        (BATCH, seq, heads, WINDOW + 1),
        (kv_heads, codes, KEY),
    ]
    return [jnp.asarray(make_normal(i, *shape).astype(dtype)) for i, shape in enumerate(shapes)]


def as_array(documents):
    return None if documents is None else jnp.asarray(documents)


def definition(query, key, value, bias, codebook, documents, **options):
    codes, _ = nearest_code(key, codebook)
    return vq_attention_reference(
        query,
        quantize(key, codebook, codes).vectors,
        value,
        relative_bias=bias,
        documents=as_array(documents),
        window_len=WINDOW,
        scale=0.5,
        **options,
    )


def attend(query, key, value, bias, codebook, documents, **options):
    options = {"window_len": WINDOW, "scale": 0.5, **options}
    return vq_attention(
        query, key, value, codebook, relative_bias=bias, documents=as_array(documents), **options
    ).out


def with_gradients(function, inputs, documents, **options):
    """Returns the output and the gradients of query, key, value and bias, compiled together."""
    *inputs, codebook = inputs
    cotangent = make_normal(9, *inputs[0].shape[:3], VALUE)

    @jax.jit
    def run(*inputs):
        out, back = jax.vjp(lambda *x: function(*x, codebook, documents, **options), *inputs)
        return out, back(jnp.asarray(cotangent, out.dtype))

    return run(*inputs)


@functools.cache
@in_float64
def expected(has_documents, **options):
    documents = DOCUMENTS if has_documents else None
    return with_gradients(definition, make_inputs(), documents, **options)


def is_slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


RULES = ({}, is_slow({"grad_through_cache": False}), is_slow({"use_table": False}))
BLOCKS = (is_slow(1), 4, is_slow(5), is_slow(8), is_slow(22), is_slow(SEQ), is_slow(64))


@pytest.mark.parametrize("block_len", BLOCKS)
@pytest.mark.parametrize("rule", RULES, ids=str)
@in_float64
def test_values_and_gradients_are_those_of_the_definition(rule, block_len):
    options = {**rule, "block_len": block_len, "implementation": "linear"}
    for has_documents in (True, False):
        documents = DOCUMENTS if has_documents else None
        actual = with_gradients(attend, make_inputs(), documents, **options)
        assert_trees_close(actual, expected(has_documents, **rule), rel_rms=1e-13)  # seen: 3e-16


@pytest.mark.parametrize("reduction", [is_slow("matmul"), "associative"])
@in_float64
def test_reductions_agree(reduction):
    options = {"block_len": 4, "reduction": reduction}
    actual = with_gradients(attend, make_inputs(), DOCUMENTS, **options)
    assert_trees_close(actual, expected(True), rel_rms=1e-13)


@in_float64
def test_the_quadratic_form_is_one_block():
    actual = with_gradients(attend, make_inputs(), DOCUMENTS, implementation="quadratic")
    assert_trees_close(actual, expected(True), rel_rms=1e-13)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "codes"), [(1, 1, 2), is_slow(3, 1, 40), is_slow(2, 2, 7)], ids=str
)
def test_float32_heads_and_codes(heads, kv_heads, codes):
    """One head, shared heads, heads of their own; two codes, and more codes than tokens."""
    inputs = make_inputs(np.float32, heads, kv_heads, codes=codes)
    actual = with_gradients(attend, inputs, DOCUMENTS, block_len=4)
    reference = with_gradients(definition, inputs, DOCUMENTS)
    assert_trees_close(actual, reference, rel_rms=1e-5)  # seen: 4e-7


@pytest.mark.slow
def test_bfloat16():
    inputs = [x.astype(jnp.bfloat16) for x in make_inputs(np.float32)]
    actual = with_gradients(attend, inputs, DOCUMENTS, block_len=4)
    exact = with_gradients(definition, [x.astype(jnp.float32) for x in inputs], DOCUMENTS)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(actual))
    assert_close(actual[0], exact[0], rel_rms=5e-3)
    for left, right in zip(actual[1], exact[1], strict=True):
        assert_close(left, right, rel_rms=1e-2)


@in_float64
def test_all_equal_keys_are_a_mean_of_values():
    """One code takes everything, the others stay empty; without a bias attention is uniform."""
    query, key, value, _, codebook = make_inputs()
    key = jnp.broadcast_to(key[:, :1], key.shape)
    mean = np.cumsum(value, axis=1) / np.arange(1, SEQ + 1)[None, :, None, None]
    run = jax.jit(functools.partial(attend, bias=None, documents=None, block_len=4))
    out = run(query, key, value, codebook=codebook)
    assert_close(out, np.repeat(mean, HEADS // KV_HEADS, axis=2), rel_rms=1e-13)


@pytest.mark.parametrize("size", [1e4, 0.0])
def test_extreme_scores_are_finite(size):
    query, *rest = make_inputs(np.float32)
    out, gradients = with_gradients(attend, [size * query, *rest], DOCUMENTS, block_len=4)
    assert all(np.isfinite(x).all() for x in (out, *gradients))


@pytest.mark.slow
@in_float64
def test_far_keys_get_no_gradient_and_near_ones_the_straight_through():
    query, key, value, bias, codebook = make_inputs()

    def last(key):
        return jnp.sum(attend(query, key, value, bias, codebook, None, block_len=4)[:, -1])

    gradient = np.abs(jax.grad(last)(key)).sum((0, 2, 3))
    assert (gradient[: SEQ - 1 - WINDOW] == 0).all() and (gradient[SEQ - 1 - WINDOW :] > 0).all()


@pytest.mark.parametrize("length", [1, 7])
@in_float64
def test_the_codebook_gets_no_gradient(length):
    """Nor from one token that reads a filled table."""
    *inputs, codebook = make_inputs()
    _, state = in_calls([SEQ], make_inputs(), None, block_len=4)
    query, key, value, bias = (x[:, :length] for x in inputs)

    def loss(codebook):
        out = vq_attention(query, key, value, codebook, state, relative_bias=bias).out
        return jnp.sum(out**2)

    assert not np.any(jax.jit(jax.grad(loss))(codebook))


@pytest.mark.slow
@in_float64
def test_vmap_checkpoint_and_jit_compose():
    inputs = make_inputs()
    tree = [jnp.stack([x, 2 * x]) for x in inputs[:4]]

    @jax.jit
    def run(*x):
        attention = functools.partial(attend, codebook=inputs[4], documents=DOCUMENTS, block_len=8)
        return jax.vmap(jax.checkpoint(jax.grad(lambda *x: jnp.sum(attention(*x) ** 2))))(*x)

    def one(query):
        out = definition(query, *(2 * x for x in inputs[1:4]), inputs[4], DOCUMENTS)
        return jnp.sum(out**2)

    assert_close(run(*tree)[1], jax.grad(one)(2 * inputs[0]), rel_rms=1e-12)


# --- the state ---------------------------------------------------------------------------------


def in_calls(lengths, inputs, documents, **options):
    """Returns outputs and final state of a sequence fed in calls."""
    *arrays, codebook = inputs
    dtype = arrays[0].dtype
    kv_heads = arrays[1].shape[2]
    state = init_vq_state(BATCH, WINDOW, kv_heads, KEY, VALUE, codebook.shape[1], dtype)
    start, outs = 0, []
    for length in lengths:
        piece = slice(start, start + length)
        query, key, value, bias = (x[:, piece] for x in arrays)
        marks = None if documents is None else documents[:, piece]
        result = jitted(query, key, value, codebook, state, bias, marks, **options)
        state = result.state
        outs.append(result.out)
        start += length
    assert start == SEQ
    return jnp.concatenate(outs, axis=1), state


@functools.partial(jax.jit, static_argnames=("block_len", "implementation"))
def jitted(query, key, value, codebook, state, bias, documents, **options):
    return vq_attention(
        query,
        key,
        value,
        codebook,
        state,
        relative_bias=bias,
        documents=documents,
        scale=0.5,
        **options,
    )


@given(st.lists(st.sampled_from((1, 3, 7)), min_size=23, max_size=23))
@settings(deadline=None, max_examples=6)
@in_float64
def test_any_split_is_one_call(lengths):
    kept, left = [], SEQ
    for length in lengths:
        if length <= left:
            kept.append(length)
            left -= length
    kept += [1] * left
    out, _ = in_calls(kept, make_inputs(), DOCUMENTS, block_len=2)
    assert_close(out, expected(True)[0], rel_rms=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("has_documents", [True, False])
@in_float64
def test_the_state_is_the_same_at_any_split(has_documents):
    documents = DOCUMENTS if has_documents else None
    _, steps = in_calls([1] * SEQ, make_inputs(), documents)
    _, whole = in_calls([SEQ], make_inputs(), documents, block_len=4)
    _, mixed = in_calls([7, 7, 1, 7, 1], make_inputs(), documents, block_len=3)
    for state in (steps, mixed):
        assert np.array_equal(state.table.count, whole.table.count)
        assert np.array_equal(state.table.document, whole.table.document)
        seen = np.asarray(whole.table.count > 0)[..., None]
        assert_close(state.table.mean * seen, whole.table.mean * seen, rel_rms=1e-13)
        for name in ("key", "value", "codes", "documents", "position"):
            assert np.array_equal(getattr(state, name), getattr(whole, name)), name


@pytest.mark.slow
@in_float64
def test_a_step_has_the_gradients_of_a_block():
    inputs = [x[:, :1] for x in make_inputs()[:4]]
    codebook = make_inputs()[4]
    _, state = in_calls([SEQ], make_inputs(), None, block_len=4)

    def run(implementation):
        def loss(inputs, value, mean):
            table = state.table._replace(mean=mean)
            filled = state._replace(value=value, table=table)
            query, key, value, bias = inputs
            result = vq_attention(
                query,
                key,
                value,
                codebook,
                filled,
                relative_bias=bias,
                implementation=implementation,
            )
            return jnp.sum(result.out**2) + jnp.sum(result.state.table.mean**2)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(inputs, state.value, state.table.mean)

    assert_trees_close(run("auto"), run("linear"), rel_rms=1e-12)


@pytest.mark.slow
def test_rows_stand_at_different_positions():
    inputs = make_inputs(np.float32)
    whole, _ = in_calls([SEQ], inputs, DOCUMENTS)
    states = [in_calls_prefix(inputs, length) for length in (3, 12)]
    state = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), *states)

    def rows(x):
        return jnp.stack([x[0, 3:7], x[1, 12:16]])

    query, key, value, bias = (rows(x) for x in inputs[:4])
    result = jitted(query, key, value, inputs[4], state, bias, rows(jnp.asarray(DOCUMENTS)))
    assert_close(result.out, rows(whole), rel_rms=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES[1:], ids=str)
@in_float64
def test_steps_keep_the_rules(rule):
    """Twelve single tokens after a block: values and gradients of the definition."""

    def run(query, key, value, bias, codebook, documents):
        arrays, outs = (query, key, value, bias), []
        shape = (BATCH, WINDOW, KV_HEADS, KEY, VALUE, CODES, jnp.float64)
        state = init_vq_state(*shape)
        for start, stop in [(0, 11), *((t, t + 1) for t in range(11, SEQ))]:
            query, key, value, bias = (x[:, start:stop] for x in arrays)
            marks = jnp.asarray(documents[:, start:stop])
            options = {"relative_bias": bias, "documents": marks, "block_len": 4, "scale": 0.5}
            result = vq_attention(query, key, value, codebook, state, **options, **rule)
            state = result.state
            outs.append(result.out)
        return jnp.concatenate(outs, axis=1)

    actual = with_gradients(run, make_inputs(), DOCUMENTS)
    assert_trees_close(actual, expected(True, **rule), rel_rms=1e-13)


def in_calls_prefix(inputs, length):
    query, key, value, bias = (x[:, :length] for x in inputs[:4])
    documents = jnp.asarray(DOCUMENTS[:, :length])
    state = init_vq_state(BATCH, WINDOW, KV_HEADS, KEY, VALUE, CODES)
    return jitted(query, key, value, inputs[4], state, bias, documents).state


def test_a_state_of_constant_size():
    state = init_vq_state(3, 10, 2, 4, 6, 7, "bfloat16")
    ring, table, marks = 10 * 2 * (4 + 6) * 2, 2 * 7 * (6 + 1) * 4, (10 * (2 + 1) + 2) * 4
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == 3 * (ring + table + marks)


def test_counts_stay_exact_in_bfloat16():
    """A code that is hit more than 256 times: a bfloat16 count would stop there."""
    key = jnp.ones((1, 1500, 1, KEY), jnp.bfloat16)
    value = jnp.full((1, 1500, 1, VALUE), 0.439, jnp.bfloat16)
    codebook = jnp.asarray(make_normal(0, 1, 3, KEY), jnp.float32)
    run = jax.jit(functools.partial(vq_attention, window_len=4, block_len=8))
    table = run(key, key, value, codebook).state.table
    assert int(jnp.max(table.count)) == 1496
    assert_close(
        jnp.max(table.mean, axis=2), np.full((1, 1, VALUE), value[0, 0, 0, 0]), rel_rms=1e-6
    )


# --- the table ---------------------------------------------------------------------------------


def make_blocks(n_blocks=4, length=3):
    codes = np.random.default_rng(0).integers(0, CODES, (n_blocks, BATCH, KV_HEADS, length))
    value = make_normal(1, n_blocks, BATCH, KV_HEADS, length, VALUE)
    documents = np.array([[[-1, -1, 0], [0] * 3], [[0] * 3, [0, 1, 1]], [[1, 2, 2], [1] * 3]])
    documents = np.concatenate([documents, [[[2, 2, -1], [2] * 3]]])[:n_blocks]
    return jnp.asarray(codes, jnp.int32), jnp.asarray(value), jnp.asarray(documents, jnp.int32)


def by_hand(codes, value, documents, row):
    """Counts and means of the last document's tokens."""
    document = documents[:, row].max()
    count, total = np.zeros((KV_HEADS, CODES), int), np.zeros((KV_HEADS, CODES, VALUE))
    for block, head, place in np.ndindex(codes.shape[0], KV_HEADS, codes.shape[3]):
        if documents[block, row, place] == document and document >= 0:
            count[head, codes[block, row, head, place]] += 1
            total[head, codes[block, row, head, place]] += value[block, row, head, place]
    return count, total / np.maximum(count, 1)[..., None]


@pytest.mark.parametrize(
    "reduction", [is_slow("serial"), is_slow("matmul"), is_slow("associative")]
)
@in_float64
def test_tables_count_the_last_document(reduction):
    codes, value, documents = make_blocks()
    empty = empty_table(BATCH, KV_HEADS, CODES, VALUE, jnp.float64)
    for n_before in (0, 1):  # from nothing, and from a table carried over
        start = empty
        if n_before:
            start = file_tokens(empty, codes[0], value[0], documents[0])
        rest = (x[n_before:] for x in (codes, value, documents))
        tables = tables_before_blocks(start, *rest, reduction)
        assert np.array_equal(tables.count[0], start.count) and tables.count.dtype == jnp.int32
        for n, row in np.ndindex(4 - n_before, BATCH):
            pieces = (np.asarray(x)[: n_before + n + 1] for x in (codes, value, documents))
            count, mean = by_hand(*pieces, row)
            assert np.array_equal(tables.count[n + 1, row], count)
            actual = np.asarray(tables.mean[n + 1, row]) * (count > 0)[..., None]
            assert_close(actual, mean, rel_rms=1e-13)


@in_float64
def test_merging_tables_is_associative():
    codes, value, documents = make_blocks()
    empty = empty_table(BATCH, KV_HEADS, CODES, VALUE, jnp.float64)
    a, b, c = (file_tokens(empty, codes[i], value[i], documents[i]) for i in range(3))
    left, right = merge_tables(merge_tables(a, b), c), merge_tables(a, merge_tables(b, c))
    for pair in ((left, right), (merge_tables(empty, a), a), (merge_tables(a, empty), a)):
        assert_trees_close(
            *(jax.tree.map(lambda x: x + 0.0, table) for table in pair), rel_rms=1e-13
        )


@pytest.mark.slow
@in_float64
def test_filing_one_token_is_filing_tokens():
    codes, value, documents = make_blocks()
    one = many = empty_table(BATCH, KV_HEADS, CODES, VALUE, jnp.float64)
    for block, place in np.ndindex(4, 3):
        token = codes[block, :, :, place], value[block, :, :, place], documents[block, :, place]
        one = file_token(one, *token)
        many = file_tokens(many, token[0][..., None], token[1][..., None, :], token[2][..., None])
        seen = np.asarray(many.count > 0)[..., None]
        assert np.array_equal(one.count, many.count)
        assert_close(one.mean * seen, many.mean * seen, rel_rms=1e-13)


@in_float64
def test_a_full_count_is_an_integer():
    """2^24 + 1 is no float32: integer counts keep it."""
    many = 2**24
    table = Table(
        jnp.zeros((1, 1, 1, 1), jnp.float32),
        jnp.full((1, 1, 1), many, jnp.int32),
        jnp.zeros(1, jnp.int32),
    )
    table = file_token(table, jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1, 1)), table.document)
    assert int(table.count[0, 0, 0]) == many + 1


# --- errors ------------------------------------------------------------------------------------

MISTAKES = [
    ({"codebook": np.zeros((3, CODES, KEY))}, "the codebook must be .* got \\(3, 5, 4\\)"),
    ({"key": np.zeros((BATCH, SEQ, 3, KEY)), "codebook": np.zeros((3, 2, KEY))}, "multiple of key"),
    ({"window_len": -1}, "window_len must be at least 1: got -1"),
    ({"window_len": 3}, "relative_bias must list distances 0 .. window_len at most: got 6"),
    ({"block_len": -1}, "block_len must not be negative: got -1"),
    ({"reduction": "sum"}, "reduction must be one of .* got 'sum'"),
    ({"value": np.zeros((BATCH, SEQ - 1, KV_HEADS, VALUE))}, "value must have the batch and tok"),
    ({"value": np.zeros((BATCH, SEQ, 1, VALUE))}, "value must have the heads of key, 2"),
    ({"relative_bias": np.zeros((BATCH, SEQ, 2, 3))}, "relative_bias must have the heads of quer"),
    ({"documents": np.zeros((BATCH, 3), np.int32)}, "documents must be .* got \\(2, 3\\)"),
    ({"documents": np.full((BATCH, SEQ), -1, np.int32)}, "documents must not be negative: got -1"),
    ({"implementation": "cuda"}, "implementation must be one of .* got 'cuda'"),
    (
        {"state": (1, WINDOW, KV_HEADS, KEY, VALUE, CODES)},
        "state must have the 2 rows .* shape \\(1, 5",
    ),
    ({"state": (BATCH, WINDOW, KV_HEADS, KEY, VALUE, 9)}, "state.table.mean must be "),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=lambda x: str(x)[:30])
def test_a_mistake_says_what_was_given(changes, message):
    query, key, value, bias, codebook = make_inputs(np.float32)
    changes = {
        k: jnp.asarray(v, np.int32 if k == "documents" else np.float32)
        if isinstance(v, np.ndarray)
        else v
        for k, v in changes.items()
    }
    if "state" in changes:
        changes["state"] = init_vq_state(*changes["state"])
    arrays = {"query": query, "key": key, "value": value, "codebook": codebook}
    if changes.get("key") is not None:
        arrays["value"] = jnp.zeros((BATCH, SEQ, 3, VALUE))
    options = {"window_len": WINDOW, "relative_bias": bias, **arrays, **changes}
    with pytest.raises(ValueError, match=message):
        vq_attention(**options)


@pytest.mark.parametrize("option", ["implementation", "search", "reduction"])
def test_a_kernel_is_refused_on_a_cpu(option):
    query, key, value, _, codebook = make_inputs(np.float32)
    with pytest.raises(NotImplementedError, match="pallas_triton.* a GPU kernel, and jax runs on"):
        vq_attention(query, key, value, codebook, **{option: "pallas_triton"})


@in_float64
def test_keys_carried_past_an_update_follow_the_codebook():
    """With a codebook that moved, one call is as the same in pieces; gradients reach old keys."""
    query, key, value, bias, codebook = make_inputs()
    moved = codebook + 0.3 * make_normal(9, *codebook.shape)
    options = {"documents": None, "window_len": WINDOW, "scale": 0.5}

    @jax.jit
    def attend(query, key, value, bias, state, words):
        return vq_attention(query, key, value, words, state, relative_bias=bias, **options)

    def call(tokens, state, words):
        return attend(*(x[:, tokens] for x in (query, key, value, bias)), state, words)

    empty = init_vq_state(BATCH, WINDOW, KV_HEADS, KEY, VALUE, CODES, "float64")
    old = call(slice(0, 7), empty, codebook).state
    whole = call(slice(7, SEQ), renewed(old, moved), moved)
    state, outs = old, []
    for start in range(7, SEQ, 4):
        result = call(slice(start, start + 4), renewed(state, moved), moved)
        state = result.state
        outs.append(result.out)
    assert_close(jnp.concatenate(outs, axis=1), whole.out, rel_rms=1e-12)
    assert_trees_close(state, whole.state, rel_rms=1e-12)
    gradient = jax.grad(lambda key: jnp.sum(renewed(old._replace(key=key), moved).key))(old.key)
    assert np.all(np.asarray(gradient) == 1.0)
