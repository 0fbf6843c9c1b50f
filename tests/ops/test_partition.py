"""Kernels on a mesh see the rows and heads of one device."""

import jax
import numpy as np
import pytest

from longctx_jax.ops.decay import decay_attention, select
from longctx_jax.ops.dispatch import Implementation
from longctx_jax.ops.partition import by_rows_and_heads
from longctx_jax.ops.vq import select as vq_select
from tests.helpers import assert_trees_close, make_normal, run_on_devices

BATCH, SEQ, HEADS, KV_HEADS, WIDTH = 4, 6, 4, 2, 3


def test_without_a_mesh_nothing_is_cut():
    x = np.ones((4, 3))
    out = by_rows_and_heads(lambda a, b: (a.shape, b), (x, None), ("b.", "b."), ("..", ".."))
    assert out == ((4, 3), None)


def check():
    """A pretended kernel: the plain form, which writes down the shapes it is called with."""
    seen = []

    def kernel(query, key, value, log_decay, state, *, reset, scale):
        seen.append((query.shape, key.shape, log_decay.shape))
        query, key, value = (select.share_heads(x, query.shape[2]) for x in (query, key, value))
        plain = select.two_pass.decay_attention_two_pass
        return plain(query, key, value, log_decay, state, reset=reset, scale=scale)

    others = [i for i in select.IMPLEMENTATIONS if i.name != "pallas_triton"]
    select.IMPLEMENTATIONS = (Implementation("pallas_triton", kernel), *others)
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=types)
    query = make_normal(0, BATCH, SEQ, HEADS, WIDTH).astype(np.float32)
    key, value = (make_normal(i, BATCH, SEQ, KV_HEADS, WIDTH).astype(np.float32) for i in (1, 2))
    state = make_normal(3, BATCH, HEADS, WIDTH, WIDTH).astype(np.float32)
    reset = make_normal(4, BATCH, SEQ) > 1
    constant = -np.exp(make_normal(5, HEADS)).astype(np.float32)
    gates = -np.exp(make_normal(6, BATCH, SEQ, HEADS)).astype(np.float32)
    for log_decay, own_state, own_reset in ((constant, None, None), (gates, state, reset)):

        def loss(query, key, value, implementation, rest=(log_decay, own_state, own_reset)):
            out = decay_attention(
                query, key, value, *rest[:2], reset=rest[2], implementation=implementation
            )
            return sum((x**2).sum() for x in out), out

        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
        expected = step(query, key, value, "two_pass")
        seen.clear()
        with jax.set_mesh(mesh):
            found = step(query, key, value, "pallas_triton")
        half = (BATCH // 2, SEQ, HEADS // 2)
        decay_shape = half if log_decay.ndim == 3 else half[2:]
        assert seen[0] == ((*half, WIDTH), (*half[:2], KV_HEADS // 2, WIDTH), decay_shape)
        assert_trees_close(found, expected, rel_rms=1e-5)


def check_vq():
    """A pretended kernel of VQ attention: the plain form of two rows on each of two devices."""
    seen = []

    def kernel(rules, blocks, constants):
        seen.append(blocks.query.shape[1])
        return vq_select.attend_blocks(rules, blocks, constants)

    def search(vectors, codebook):
        seen.append(vectors.shape[0])
        return vq_select.search_codes(vectors, codebook)

    attention = [i for i in vq_select.ATTENTION if i.name != "pallas_triton"]
    vq_select.ATTENTION = (Implementation("pallas_triton", kernel), *attention)
    searches = [i for i in vq_select.SEARCHES if i.name != "pallas_triton"]
    vq_select.SEARCHES = (Implementation("pallas_triton", search), *searches)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    query = make_normal(0, BATCH, SEQ, HEADS, WIDTH).astype(np.float32)
    key, value = (make_normal(i, BATCH, SEQ, KV_HEADS, WIDTH).astype(np.float32) for i in (1, 2))
    codebook = make_normal(3, KV_HEADS, 5, WIDTH).astype(np.float32)

    def loss(query, key, value, name, search):
        options = {"window_len": 2, "block_len": 2, "reduction": "serial"}
        out = vq_select.vq_attention(
            query, key, value, codebook, implementation=name, search=search, **options
        )
        return (out.out**2).sum(), out

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=(3, 4))
    expected = step(query, key, value, "linear", "xla")
    with jax.set_mesh(mesh):
        found = step(query, key, value, "pallas_triton", "pallas_triton")
    assert set(seen) == {BATCH // 2}
    assert_trees_close(found, expected, rel_rms=1e-5)


@pytest.mark.slow
def test_two_devices_share_rows():
    run_on_devices("from tests.ops import test_partition as t\nt.check_vq()", n_devices=2)


@pytest.mark.slow
def test_four_devices_share_rows_and_heads():
    run_on_devices("from tests.ops import test_partition as t\nt.check()", n_devices=4)
