"""The part "attention" of the suite decode: what is counted, and what its rows say."""

import jax
import jax.numpy as jnp
import pytest

from longctx_jax.benchmarking.decode import attention
from longctx_jax.benchmarking.decode.attention import Shape
from longctx_jax.benchmarking.decode.panels import panels
from longctx_jax.benchmarking.rows import flat, within
from longctx_jax.benchmarking.timing import Limits
from tests.helpers import assert_close


def test_bytes_are_those_of_what_a_layer_reads():
    ring, rows = attention.SHAPES["gqa-8"], attention.SHAPES["rows of 512"]
    assert attention.layer_bytes(ring, 2, 100, "bfloat16") == 2 * 100 * 8 * (64 + 64) * 2
    assert attention.layer_bytes(rows, 1, 100, "bfloat16") == 100 * 512 * 2


@pytest.mark.parametrize("shape", [Shape(4, 2, 8, 6), Shape(4, 1, 8)], ids=["ring", "rows"])
def test_every_layer_attends_to_its_own_part(shape, monkeypatch):
    monkeypatch.setattr(attention, "N_LAYERS", 2)
    query, key, value = attention.make_inputs(shape, 2, 5, "float32")
    found = jax.jit(attention.through_layers, static_argnames="implementation")
    expected = query
    if shape.d_value:  # a query as wide as what is added to it
        query, key = query[..., :6], key[..., :6]
        expected = query
    for layer in range(2):
        k, v = (key, key) if value is None else (key[layer], value[layer])
        k, v = (jnp.repeat(x, 4 // shape.kv_heads, axis=1) for x in (k, v))
        scores = jnp.einsum("bthk,bhsk->bhts", expected, k) * k.shape[-1] ** -0.5
        expected += jnp.einsum("bhts,bhsv->bthv", jax.nn.softmax(scores), v)
    assert_close(found(query, key, value, implementation="xla"), expected, rel_rms=1e-5)


def test_rows():
    limits = Limits(n_runs=2, n_warmup=0, is_quick=True)
    rows = list(map(flat, within(attention.attention_rows(limits), part="attention")))
    assert {row["variant"] for row in rows} == set(attention.SMALL)
    assert {(row["implementation"], row["batch_size"]) for row in rows} == {("xla", 1), ("xla", 8)}
    assert all(row["floor_ms"] > 0 and row["ideal_bytes"] > 0 for row in rows)
    drawn = [panel.title for group in panels(rows) for panel in group.panels if panel.rows]
    assert drawn == ["time a layer, xla"]
