"""Tokenizers, and a text stream seen as a stream of tokens.

Bits per byte need the number of raw text bytes behind each token, so a tokenizer reports it. Here:
bytes, for which a text stream already is the token stream. Another tokenizer adds a class here, its
name to `TOKENIZERS`, and a `TokenStream` that holds the token offsets of each document; nothing
downstream of `tokenize` knows which one it reads.
"""

from typing import Protocol

import numpy as np

from longctx_jax.data.streams import TextStream


class Tokenizer(Protocol):
    """A reversible map between text bytes and token ids `0 .. vocab_size-1`."""

    name: str
    vocab_size: int

    def encode(self, text: bytes | str) -> np.ndarray:
        """Returns the ids of `text` (a `str` is taken as UTF-8), int32 [n_tokens]."""
        ...

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the text bytes that `ids` stand for."""
        ...

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Returns how many raw text bytes each id stands for, int64, shape of `ids`."""
        ...


class ByteTokenizer:
    """Each byte is a token whose id is its value."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: bytes | str) -> np.ndarray:
        """Returns the byte values of `text` (a `str` is encoded as UTF-8), int32 [n_bytes]."""
        raw = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        return np.frombuffer(raw, np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes with these values; raises ValueError for an id outside 0 .. 255."""
        ids = np.asarray(ids)
        check_ids(ids, self.vocab_size, "the ids to decode")
        return ids.astype(np.uint8).tobytes()

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Returns ones of the shape of `ids`, int64: a token is one byte."""
        return np.ones(np.shape(ids), np.int64)


TOKENIZERS = {"bytes": ByteTokenizer}


def build_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer called `name`, the value of `config.data.tokenizer`.

    Raises:
        ValueError: for a name not in the list.
    """
    if name not in TOKENIZERS:
        raise ValueError(
            f"config.data.tokenizer must be one of {sorted(TOKENIZERS)}: got {name!r}; "
            "set it to one of them"
        )
    return TOKENIZERS[name]()


def check_ids(ids: np.ndarray, vocab_size: int, what: str, first_position: int = 0) -> None:
    """Raises ValueError unless every id lies in `0 .. vocab_size-1`.

    Args:
        ids: token ids, any shape.
        vocab_size: number of ids the model knows.
        what: where they were read, for the message.
        first_position: position of `ids[0]` in that place.
    """
    ids = np.asarray(ids).ravel()
    if ids.size == 0 or (ids.max() < vocab_size and ids.min() >= 0):
        return
    index = int(np.argmax((ids < 0) | (ids >= vocab_size)))
    raise ValueError(
        f"every byte value must lie in 0 .. vocab_size-1: got {int(ids[index])} at position "
        f"{first_position + index} of {what}, vocab_size={vocab_size}; set "
        f"config.model.vocab_size above the largest value (256 covers all bytes)"
    )


class TokenStream(Protocol):
    """A stream of token ids with random access and document boundaries.

    Attributes:
        name: the text stream's.
        n_tokens, n_documents: sizes, at least 1.
        tokenizer: what cut the text.
    """

    name: str
    n_tokens: int
    n_documents: int
    tokenizer: Tokenizer

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start .. stop-1`, int32 [stop - start]."""
        ...

    def document_index(self, positions: np.ndarray | int) -> np.ndarray:
        """Returns the document each token position belongs to, int64."""
        ...

    def byte_offset(self, position: int) -> int:
        """Returns where in the text the token at `position` begins, bytes."""
        ...

    def tokens_within(self, n_bytes: int) -> int:
        """Returns how many whole tokens lie within the first `n_bytes` of the text."""
        ...


class ByteTokenStream:
    """The token stream of a text stream whose tokens are its bytes; see `TokenStream`."""

    def __init__(self, stream: TextStream, tokenizer: Tokenizer):
        """Wraps `stream`; costs nothing."""
        self.name = stream.name
        self.n_tokens = stream.n_bytes
        self.n_documents = stream.document_starts.size
        self.tokenizer = tokenizer
        self._stream = stream

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start .. stop-1`, int32 [stop - start]."""
        return self._stream.read(start, stop).astype(np.int32)

    def document_index(self, positions: np.ndarray | int) -> np.ndarray:
        """Returns the document each token position belongs to, int64."""
        return self._stream.document_index(positions)

    def byte_offset(self, position: int) -> int:
        """Returns `position`: a token is a byte."""
        return position

    def tokens_within(self, n_bytes: int) -> int:
        """Returns how many of the first `n_bytes` there are: a token is a byte."""
        return min(n_bytes, self.n_tokens)


def tokenize(stream: TextStream, tokenizer: Tokenizer) -> TokenStream:
    """Returns `stream` as tokens of `tokenizer`.

    Raises:
        NotImplementedError: for a tokenizer without a token stream.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return ByteTokenStream(stream, tokenizer)
    raise NotImplementedError(
        f"no token stream for tokenizer {tokenizer.name!r}; set config.data.tokenizer='bytes'"
    )
