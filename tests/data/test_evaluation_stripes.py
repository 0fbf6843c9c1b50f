import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx_jax import data
from longctx_jax.data.streams import concatenate

DTYPES = {
    "tokens": "int32",
    "targets": "int32",
    "weights": "float32",
    "segment_ids": "int32",
    "target_bytes": "int32",
}


def token_stream(n_tokens, n_documents=1):
    """Returns `n_tokens` distinct-as-can-be tokens: token i is i mod 251."""
    raw = (np.arange(n_tokens) % 251).astype(np.uint8).tobytes()
    cuts = np.linspace(0, n_tokens, n_documents + 1).astype(int)
    pieces = [raw[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return data.tokenize(concatenate("s", pieces), data.build_tokenizer("bytes"))


@settings(max_examples=120, deadline=None)
@given(
    n_tokens=st.integers(1, 300),
    batch_size=st.integers(1, 12),
    seq_len=st.integers(1, 40),
    max_bytes=st.integers(0, 320),
    n_documents=st.integers(1, 5),
)
def test_every_target_is_given_exactly_once(n_tokens, batch_size, seq_len, max_bytes, n_documents):
    tokens = token_stream(n_tokens, n_documents)
    text = tokens.read(0, n_tokens)
    batches = list(
        data.evaluation_stripes(
            tokens, batch_size=batch_size, seq_len=seq_len, max_bytes=max_bytes, vocab_size=251
        )
    )
    n = min(n_tokens, max_bytes or n_tokens)
    if n == 1:
        assert batches == []
        return
    for batch in batches:
        assert {field: str(value.dtype) for field, value in batch.items()} == DTYPES
        assert all(value.shape == (batch_size, seq_len) for value in batch.values())
        assert batch["weights"].any(), "no batch is all padding"
    whole = {f: np.concatenate([b[f] for b in batches], axis=1) for f in batches[0]}
    counts = whole["weights"] > 0
    assert (whole["weights"] == counts).all()
    assert (whole["target_bytes"] == counts).all()
    assert (whole["targets"][~counts] == 0).all() and (whole["tokens"][~counts] == 0).all()
    lengths = counts.sum(axis=1)
    assert lengths.max() - lengths.min() <= 1 and lengths.sum() == n - 1
    position = 1
    for row in range(batch_size):
        stop = position + lengths[row]
        here = slice(0, lengths[row])
        assert counts[row, here].all(), "padding comes at the end of a row only"
        assert (whole["targets"][row, here] == text[position:stop]).all()
        assert (whole["tokens"][row, here] == text[position - 1 : stop - 1]).all()
        documents = tokens.document_index(np.arange(position - 1, stop - 1))
        assert (whole["segment_ids"][row, here] == documents).all()
        position = stop
    assert position == n


def test_padding_stays_in_the_last_document():
    batches = list(data.evaluation_stripes(token_stream(10, 2), batch_size=1, seq_len=6))
    assert batches[0]["segment_ids"].tolist() == [[0, 0, 0, 0, 0, 1]]
    assert batches[1]["segment_ids"].tolist() == [[1] * 6]
    assert batches[1]["weights"].tolist() == [[1, 1, 1, 0, 0, 0]]


def test_fewer_targets_than_rows():
    (batch,) = data.evaluation_stripes(token_stream(3), batch_size=4, seq_len=5)
    assert batch["targets"][:, 0].tolist() == [1, 2, 0, 0]
    assert batch["tokens"][:, 0].tolist() == [0, 1, 0, 0]
    assert batch["weights"].sum(axis=1).tolist() == [1, 1, 0, 0]


def test_max_bytes_larger_than_the_split():
    def count(**kwargs):
        stripes = data.evaluation_stripes(token_stream(100), batch_size=2, seq_len=8, **kwargs)
        return sum(batch["target_bytes"].sum() for batch in stripes)

    assert [count(), count(max_bytes=1000), count(max_bytes=50)] == [99, 99, 49]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"batch_size": 0}, r"config\.eval\.batch_size must be at least 1: got 0"),
        ({"seq_len": 0}, r"config\.eval\.seq_len .*must be at least 1: got 0"),
        ({"max_bytes": -1}, r"config\.eval\.max_bytes must be at least 0: got -1"),
    ],
    ids=str,
)
def test_bad_settings_fail_at_the_call(changes, field):
    with pytest.raises(ValueError, match=field):
        data.evaluation_stripes(token_stream(9), **({"batch_size": 2, "seq_len": 2} | changes))


def test_bytes_outside_the_vocabulary_are_named():
    stripes = data.evaluation_stripes(token_stream(200), batch_size=2, seq_len=200, vocab_size=128)
    with pytest.raises(ValueError, match=r"got 128 at position 128 of s.*vocab_size=128"):
        next(stripes)


def test_real_text_is_covered_once(make_config, real_data_dir):
    if not (real_data_dir / "enwik8_4m").exists():
        pytest.skip(f"no enwik8_4m in {real_data_dir}")
    found = data.load_source(make_config(name="enwik8_4m", data_dir=str(real_data_dir)))
    tokens = data.tokenize(found["test"], data.build_tokenizer("bytes"))
    batches = list(data.evaluation_stripes(tokens, batch_size=8, seq_len=1024))
    rows = [
        np.concatenate([b["targets"][r][b["weights"][r] > 0] for b in batches]) for r in range(8)
    ]
    assert (
        np.concatenate(rows).astype(np.uint8).tobytes() == found["test"].read(1, 200_000).tobytes()
    )
