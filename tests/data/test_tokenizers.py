import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx_jax import data
from longctx_jax.data.streams import concatenate


@given(st.binary(max_size=50))
def test_bytes_round_trip(raw):
    tokenizer = data.build_tokenizer("bytes")
    ids = tokenizer.encode(raw)
    assert ids.dtype == np.int32 and ids.tolist() == list(raw)
    assert tokenizer.decode(ids) == raw
    counts = tokenizer.token_bytes(ids)
    assert counts.dtype == np.int64 and counts.shape == ids.shape and counts.sum() == len(raw)


def test_a_string_is_utf8():
    tokenizer = data.build_tokenizer("bytes")
    assert tokenizer.vocab_size == 256 and tokenizer.name == "bytes"
    assert tokenizer.encode("é€").tolist() == [0xC3, 0xA9, 0xE2, 0x82, 0xAC]


def test_unknown_tokenizer_lists_the_known():
    match = r"config\.data\.tokenizer.*\['bytes', 'delimited_bytes'\].*tokenizer\.json: got 'bpe'"
    with pytest.raises(ValueError, match=match):
        data.build_tokenizer("bpe")


def test_check_ids_names_the_first_bad_value():
    data.check_ids(np.array([0, 127]), 128, "x")
    data.check_ids(np.zeros(0, np.int32), 1, "x")
    with pytest.raises(ValueError, match=r"got 200 at position 12 of x.*config\.model\.vocab_size"):
        data.check_ids(np.array([0, 127, 200, 255]), 128, "x", 10)
    with pytest.raises(ValueError, match="got -1 at position 1 of x"):
        data.check_ids(np.array([0, -1]), 128, "x")
    with pytest.raises(ValueError, match="got 256 at position 0"):
        data.build_tokenizer("bytes").decode(np.array([256]))


def test_byte_token_stream_is_the_text():
    stream = concatenate("s", [b"ab", b"c\xff"])
    tokens = data.tokenize(stream, data.build_tokenizer("bytes"))
    assert (tokens.name, tokens.n_tokens, tokens.n_documents) == ("s", 4, 2)
    read = tokens.read(1, 4)
    assert read.dtype == np.int32 and read.tolist() == [98, 99, 255]
    assert tokens.document_index(np.arange(4)).tolist() == [0, 0, 1, 1]
    assert tokens.byte_offset(3) == 3
    assert [tokens.tokens_within(n) for n in (0, 3, 9)] == [0, 3, 4]


def test_a_tokenizer_without_a_stream_is_named():
    class Other:
        name, vocab_size = "other", 10

    with pytest.raises(NotImplementedError, match=r"'other'.*config\.data\.tokenizer"):
        data.tokenize(concatenate("s", [b"ab"]), Other())
