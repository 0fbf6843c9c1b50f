"""Streaming evaluation equals one forward pass over the whole text, byte for byte."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax import data
from longctx_jax.data.streams import concatenate, count_words
from longctx_jax.evaluation.language_modeling import evaluate
from longctx_jax.models import build_model
from longctx_jax.ops.losses import token_nll
from tests.tiny import tiny_config

TEXT = (b"def f(x):\n    return x + 1\n", b"import os\nprint(os.sep)\n")


FAMILIES = ["transformer", pytest.param("decay", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=FAMILIES)
def model_and_variables(request):
    model = build_model(tiny_config(model__name=request.param).model)
    return model, model.init(jax.random.key(0))


def stream_loss(model, variables, *, batch_size=1, seq_len=7, max_bytes=0, cache_len=100):
    tokens = data.tokenize(concatenate("text", TEXT), data.build_tokenizer("bytes"))
    batches = data.evaluation_stripes(
        tokens, batch_size=batch_size, seq_len=seq_len, max_bytes=max_bytes
    )
    return evaluate(model, variables, batches, cache_len=cache_len, n_words=8)


@pytest.mark.parametrize("max_bytes", [0, 30, 1])
def test_one_stripe_is_one_forward_pass(model_and_variables, max_bytes):
    model, variables = model_and_variables
    result = stream_loss(model, variables, max_bytes=max_bytes)
    text = np.frombuffer(b"".join(TEXT), np.uint8).astype(np.int32)
    segments = np.repeat([0, 1], [len(t) for t in TEXT]).astype(np.int32)
    n = max_bytes or len(text)
    nats = math.log(256)
    if n > 1:
        logits = model.apply(variables, text[None, :-1], segment_ids=segments[None, :-1]).logits
        nats += float(jnp.sum(token_nll(logits, jnp.asarray(text[None, 1:]))[0, : n - 1]))
    assert result["tokens"] == result["bytes"] == n
    assert result["nats_per_token"] == pytest.approx(nats / n, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / n / math.log(2), rel=1e-5)
    assert result["perplexity_per_word"] == pytest.approx(math.exp(nats / 8), rel=1e-3)


def test_stripes_cover_every_byte_and_start_cold(model_and_variables):
    model, variables = model_and_variables
    result = stream_loss(model, variables, batch_size=3, seq_len=5)
    assert result["bytes"] == sum(len(t) for t in TEXT)


def test_the_window_length_does_not_matter(model_and_variables):
    model, variables = model_and_variables
    losses = [stream_loss(model, variables, seq_len=n)["nats_per_token"] for n in (4, 7)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loss_that_is_not_finite_is_an_error(model_and_variables):
    model, variables = model_and_variables
    broken = jax.tree.map(lambda x: x * jnp.nan, variables)
    with pytest.raises(ValueError, match="must be finite"):
        stream_loss(model, broken)


def test_progress_reaches_the_end(model_and_variables):
    model, variables = model_and_variables
    tokens = data.tokenize(concatenate("text", TEXT), data.build_tokenizer("bytes"))
    seen = []
    batches = data.evaluation_stripes(tokens, batch_size=1, seq_len=7)
    evaluate(model, variables, batches, cache_len=9, progress=lambda n, s: seen.append(n))
    assert seen == sorted(seen) and seen[-1] == tokens.n_tokens


@pytest.mark.parametrize("piece_bytes", [1, 3, 1000])
def test_words_are_counted_across_pieces(piece_bytes):
    stream = concatenate("text", (b" one  two\n", b"three\tfour"))
    assert count_words(stream, piece_bytes=piece_bytes) == 4
    assert count_words(stream, 7, piece_bytes=piece_bytes) == 2
