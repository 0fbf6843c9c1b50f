"""Bits per byte by position: the curve adds up to the whole, and each interval is its own."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax import data
from longctx_jax.data.streams import concatenate
from longctx_jax.evaluation.language_modeling import evaluate
from longctx_jax.evaluation.positions import PositionCurve, doubling_edges
from longctx_jax.models import build_model
from longctx_jax.ops.losses import token_nll
from tests.tiny import tiny_config


def test_edges_double_up_to_the_length():
    assert doubling_edges(1024) == (0, 128, 256, 512, 1024)
    assert doubling_edges(300) == (0, 128, 256, 300)
    assert doubling_edges(128) == (0, 128)
    assert doubling_edges(7) == (0, 7)


@pytest.mark.parametrize("edges", [(), (0,), (0, 4, 4), (4, 0)])
def test_edges_must_rise(edges):
    with pytest.raises(ValueError, match="rising: got"):
        PositionCurve(edges)


def test_windows_may_cross_edges_and_leave_the_curve():
    curve = PositionCurve((2, 4, 5, 9))
    nll = np.arange(6.0)[None] * math.log(2)
    curve(0, nll[:, :3], np.ones((1, 3), int))  # bits 0, 1, 2 at positions 0, 1, 2
    curve(3, nll[:, 3:], np.array([[1, 3, 0]]))  # bits 3, 4, 5 at positions 3, 4, 5
    assert curve.bits_per_byte() == pytest.approx([5 / 2, 4 / 3, None])


def test_the_curve_is_that_of_a_forward_pass():
    model = build_model(tiny_config().model)
    variables = model.init(jax.random.key(0))
    text = bytes(range(60, 97))
    tokens = data.tokenize(concatenate("text", (text,)), data.build_tokenizer("bytes"))
    curve = PositionCurve((0, 5, 12, 100))
    batches = data.evaluation_stripes(tokens, batch_size=2, seq_len=7)
    result = evaluate(model, variables, batches, cache_len=100, observe=curve)

    stripes = np.frombuffer(text, np.uint8).astype(np.int32)
    stripes = np.stack([stripes[:19], stripes[18:]])  # 36 targets: two stripes of 18
    logits = model.apply(variables, stripes[:, :-1]).logits
    nll = np.asarray(token_nll(logits, jnp.asarray(stripes[:, 1:])), np.float64)
    for part, cut in zip(curve.nats, (slice(0, 5), slice(5, 12), slice(12, None)), strict=True):
        assert part == pytest.approx(np.sum(nll[:, cut]), rel=1e-5)
    assert curve.n_bytes.tolist() == [10, 14, 12]
    first_byte = math.log(256)  # stands before all stripes
    assert np.sum(curve.nats) + first_byte == pytest.approx(37 * result["nats_per_token"])
