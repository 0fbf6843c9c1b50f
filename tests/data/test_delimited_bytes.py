import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx_jax import data
from longctx_jax.data.streams import ArrayStream, concatenate

SEPARATOR = 256
TOKENIZER = data.build_tokenizer("delimited_bytes")


class SampleStream(ArrayStream):
    """Samples of 12 bytes; byte i of sample k is 16 * k + i."""

    sample_bytes = 12

    def __init__(self, n_samples):
        raw = np.add.outer(16 * np.arange(n_samples), np.arange(12)).astype(np.uint8).ravel()
        super().__init__("samples", raw, np.arange(n_samples) * 12)


def laid_out(documents):
    """Returns the tokens of the documents, a separator after each."""
    return [token for document in documents for token in [*document, SEPARATOR]]


def dataset(stream, **changes):
    settings = {"seq_len": 12, "global_batch_size": 2, "seed": 0, "order": "shuffled"}
    return data.make_dataset(stream, TOKENIZER, **(settings | {"vocab_size": 257} | changes))


# the stream


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=6))
def test_a_separator_follows_each_document(documents):
    stream = concatenate("s", documents)
    tokens = data.tokenize(stream, TOKENIZER)
    expected = np.array(laid_out(documents))
    assert (tokens.n_tokens, tokens.n_documents) == (expected.size, len(documents))
    for start in range(expected.size + 1):
        for stop in range(start, expected.size + 1):
            assert tokens.read(start, stop).tolist() == expected[start:stop].tolist()
    offsets = np.cumsum([0, *TOKENIZER.token_bytes(expected)])
    assert [tokens.byte_offset(i) for i in range(expected.size + 1)] == offsets.tolist()
    for n_bytes in range(stream.n_bytes + 2):
        assert tokens.tokens_within(n_bytes) == int(np.sum(offsets[1:] <= n_bytes))
    documents_of = tokens.document_index(np.arange(expected.size))
    assert documents_of.tolist() == np.cumsum(expected == SEPARATOR).tolist()
    assert TOKENIZER.decode(expected) == b"".join(documents)


def test_reading_outside_is_an_error():
    tokens = data.tokenize(concatenate("s", [b"ab", b"c"]), TOKENIZER)
    assert tokens.read(0, 5).dtype == np.int32
    for bounds in ((-1, 2), (3, 2), (0, 6)):
        with pytest.raises(IndexError, match="5 tokens"):
            tokens.read(*bounds)


def test_which_tokens_are_bytes():
    text, samples = concatenate("s", [b"ab"]), SampleStream(2)
    plain = data.build_tokenizer("bytes")
    assert data.each_token_is_a_byte(data.tokenize(text, plain))
    assert not data.each_token_is_a_byte(data.tokenize(text, TOKENIZER))
    assert data.each_token_is_a_byte(data.tokenize(samples, TOKENIZER))
    assert data.tokenize(samples, TOKENIZER).sample_len == 13
    assert data.tokenize(text, TOKENIZER).sample_len == 0


def test_samples_need_the_separator():
    message = r"config\.data\.tokenizer must be 'delimited_bytes' for samples.*vocab_size=257"
    with pytest.raises(ValueError, match=message):
        data.tokenize(SampleStream(2), data.build_tokenizer("bytes"))
    message = r"config\.model\.vocab_size=256, and 257 ids of config\.data\.tokenizer='delimited"
    with pytest.raises(ValueError, match=message):
        dataset(SampleStream(2), vocab_size=256)


# training


@pytest.mark.parametrize("seq_len", [12, 4])
def test_windows_hold_whole_samples(seq_len):
    per_sample = 12 // seq_len
    batches = dataset(SampleStream(6), seq_len=seq_len)
    steps = [batches[step] for step in range(3 * per_sample)]
    batch = {field: np.concatenate([b[field] for b in steps]) for field in steps[0]}
    order = np.argsort(batch["targets"][:, 0])
    targets = batch["targets"][order]
    assert targets.tolist() == SampleStream(6).read(0, 72).reshape(-1, seq_len).tolist()
    assert (batch["weights"] == 1).all()
    inputs = batch["tokens"][order]
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    first = inputs[:, 0].reshape(6, per_sample)
    assert (first[:, 0] == SEPARATOR).all() and (first[:, 1:] < 256).all()
    segments = batch["segment_ids"][order].reshape(6, -1)
    assert segments.tolist() == np.repeat(np.arange(6), 12).reshape(6, 12).tolist()
    assert order.tolist() != sorted(order)


@pytest.mark.parametrize(("order", "seq_len"), [("shuffled", 5), ("stripes", 12)])
def test_elsewhere_separators_have_no_weight(order, seq_len):
    batches = dataset(SampleStream(6), order=order, seq_len=seq_len)
    for step in range(15):
        batch = batches[step]
        assert (batch["weights"] == (batch["targets"] != SEPARATOR)).all()
        begins = np.diff(batch["segment_ids"], axis=1) == 1
        assert (begins == (batch["tokens"][:, 1:] == SEPARATOR)).all()


def test_separators_of_text_are_targets():
    stream = concatenate("s", [b"abc", b"de", b"fghi"])
    batches = [dataset(stream, order="stripes", seq_len=5)[step] for step in range(6)]
    assert all((batch["weights"] == 1).all() for batch in batches)
    assert any((batch["targets"] == SEPARATOR).any() for batch in batches)


def test_the_first_window_is_named_by_its_first_byte():
    sizes = {"seq_len": 12, "global_batch_size": 1, "seed": 0, "order": "shuffled"}
    for step in range(4):
        words = data.position_of(SampleStream(4), TOKENIZER, step, **sizes)
        found = dict(word.split("=") for word in words.split())
        sample = dataset(SampleStream(4), global_batch_size=1)[step]["targets"][0, 0] // 16
        assert int(found["byte_offset"]) in (12 * sample, 48), words  # 48: before the first sample


# evaluation


@settings(max_examples=60, deadline=None)
@given(
    n_samples=st.integers(1, 9),
    batch_size=st.integers(1, 5),
    seq_len=st.integers(1, 30),
    max_bytes=st.integers(0, 110),
)
def test_stripes_are_made_of_whole_samples(n_samples, batch_size, seq_len, max_bytes):
    stream = SampleStream(n_samples)
    tokens = data.tokenize(stream, TOKENIZER)
    batches = list(
        data.evaluation_stripes(
            tokens, batch_size=batch_size, seq_len=seq_len, max_bytes=max_bytes, vocab_size=257
        )
    )
    whole = {f: np.concatenate([b[f] for b in batches], axis=1) for f in batches[0]}
    n_bytes = min(max_bytes or stream.n_bytes, stream.n_bytes)
    found = []
    for row in range(batch_size):
        counts = whole["weights"][row] > 0
        assert (whole["target_bytes"][row] == counts).all()
        if counts.any():
            assert whole["tokens"][row, 0] == SEPARATOR, "a stripe begins a sample"
        found.append(whole["targets"][row][counts])
        end = counts.size - int(np.argmax(counts[::-1])) if counts.any() else 0  # then padding
        starts = np.flatnonzero(whole["tokens"][row, :end] == SEPARATOR)
        assert (np.diff(starts) == 13).all()
        resets = np.flatnonzero(np.diff(whole["segment_ids"][row, :end])) + 1
        assert resets.tolist() == starts[1:].tolist()
    assert np.concatenate(found).tolist() == stream.read(0, n_bytes).tolist()


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(st.binary(min_size=1, max_size=6), min_size=1, max_size=6),
    batch_size=st.integers(1, 4),
    seq_len=st.integers(1, 9),
)
def test_text_gives_every_token_once_separators_included(documents, batch_size, seq_len):
    tokens = data.tokenize(concatenate("s", documents), TOKENIZER)
    batches = list(data.evaluation_stripes(tokens, batch_size=batch_size, seq_len=seq_len))
    whole = {f: np.concatenate([b[f] for b in batches], axis=1) for f in batches[0]}
    counts = whole["weights"] > 0
    targets = [whole["targets"][row][counts[row]] for row in range(batch_size)]
    inputs = [whole["tokens"][row][counts[row]] for row in range(batch_size)]
    expected = laid_out(documents)
    assert np.concatenate(targets).tolist() == expected
    assert np.concatenate(inputs).tolist() == [SEPARATOR, *expected[:-1]]
    assert whole["target_bytes"].sum() == sum(map(len, documents))
