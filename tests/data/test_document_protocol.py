"""Evaluation with separators: each document is predicted from a separator and itself alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax import data
from longctx_jax.data.sentencepiece_training import train_model
from longctx_jax.data.streams import concatenate
from longctx_jax.models import build_model
from longctx_jax.ops.losses import token_nll
from longctx_jax.runs.evaluate import evaluate_split
from longctx_jax.runs.train import train_data
from tests.data.test_delimited_bytes import SampleStream
from tests.tiny import tiny_config

BOOKS = [
    b"It was the best of times,\nit was the",
    b"worst of times. \xe2\x80\x94 It was",
    b"the age",
]


def model_for(scheme, tokenizer, **fields):
    fields = {"model__vocab_size": tokenizer.vocab_size, "data__tokenizer": tokenizer.name} | fields
    config = tiny_config(model__name=scheme, eval__cache_len=100, **fields)
    model = build_model(config.model)
    return config, model, model.init(jax.random.key(0))


def nats_apart(model, variables, tokenizer, documents, *, count_end):
    """Returns the loss of documents that each are a row of their own, from a separator on."""
    longest = max(tokenizer.encode(document).size for document in documents) + 2
    ids = np.full((len(documents), longest), tokenizer.separator_id)
    counts = np.zeros((len(documents), longest - 1))
    for row, document in enumerate(documents):
        found = data.prompt_ids(tokenizer, document)
        ids[row, : found.size] = found
        counts[row, : found.size - 1 + count_end] = 1
    logits = model.apply(variables, jnp.asarray(ids[:, :-1])).logits
    return float(np.sum(np.asarray(token_nll(logits, jnp.asarray(ids[:, 1:]))) * counts))


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("transformer", "sub-words"),
        pytest.param("decay", "delimited_bytes", marks=pytest.mark.slow),
    ],
)
def test_perplexity_per_word_is_the_published_one(scheme, kind, tmp_path):
    name = kind
    if kind == "sub-words":
        name = str(tmp_path / "m.model")
        text = concatenate("s", BOOKS * 30)
        (tmp_path / "m.model").write_bytes(train_model(text, vocab_size=300))
    tokenizer, stream = data.build_tokenizer(name), concatenate("books", BOOKS)
    config, model, variables = model_for(scheme, tokenizer, data__seq_len=7, eval__batch_size=1)
    result = evaluate_split(config, model, variables, stream, max_bytes=0)
    nats = nats_apart(model, variables, tokenizer, BOOKS, count_end=True)
    n_tokens = sum(tokenizer.encode(book).size + 1 for book in BOOKS)
    n_words = sum(len(book.split()) for book in BOOKS)
    assert result["tokens"] == n_tokens and result["bytes"] == stream.n_bytes
    assert result["nats_per_token"] == pytest.approx(nats / n_tokens, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / stream.n_bytes, rel=1e-5)
    assert result["perplexity_per_word"] == pytest.approx(math.exp(nats / n_words), rel=1e-4)


@pytest.mark.parametrize(
    ("scheme", "batch_size", "seq_len"),
    [
        pytest.param("transformer", 2, 12, marks=pytest.mark.slow),
        pytest.param("decay", 1, 7, marks=pytest.mark.slow),
        pytest.param("decay", 4, 30, marks=pytest.mark.slow),
    ],
)
def test_each_sample_is_predicted_from_nothing_before(scheme, batch_size, seq_len):
    tokenizer, stream = data.build_tokenizer("delimited_bytes"), SampleStream(5)
    config, model, variables = model_for(
        scheme, tokenizer, data__seq_len=seq_len, eval__batch_size=batch_size
    )
    result = evaluate_split(config, model, variables, stream, max_bytes=0)
    samples = [sample.tobytes() for sample in stream.read(0, 60).reshape(5, 12)]
    nats = nats_apart(model, variables, tokenizer, samples, count_end=False)
    assert result["tokens"] == result["bytes"] == 60
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / 60, rel=1e-5)
    assert "perplexity_per_word" not in result


@pytest.mark.parametrize(("seq_len", "order"), [(12, "shuffled"), (12, "stripes"), (5, "shuffled")])
def test_training_on_samples(seq_len, order):
    tokenizer = data.build_tokenizer("delimited_bytes")
    config, _, _ = model_for("decay", tokenizer, data__seq_len=seq_len, data__order=order)
    splits = data.Splits("samples", {"train": lambda: SampleStream(8)})
    of_config = train_data(config, splits)
    assert of_config.is_bytes
    batch = of_config.dataset[0]
    is_aligned = (seq_len, order) == (12, "shuffled")
    assert (batch["tokens"][:, 0] == 256).all() == is_aligned
    assert ("segment_ids" not in batch) == is_aligned, "one sample a row needs no mask"
