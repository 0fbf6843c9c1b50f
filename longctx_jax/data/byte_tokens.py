"""Bytes as tokens: plain, and with a separator, id 256, between documents.

With plain bytes a text stream already is the token stream, and the first byte of a document is
predicted from the last one of the document before. With a separator it is predicted from that.
"""

import pathlib

import numpy as np

from longctx_jax.data.streams import TextStream
from longctx_jax.data.tokens import Tokenizer, check_ids


class ByteTokenizer:
    """Each byte is a token whose id is its value."""

    name = "bytes"
    vocab_size = 256
    separator_id = -1
    start_id = -1
    identity = ""
    files: tuple[pathlib.Path, ...] = ()

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


class DelimitedByteTokenizer(ByteTokenizer):
    """Each byte is a token, and token 256, which stands for no text, follows each document."""

    name = "delimited_bytes"
    vocab_size = 257
    separator_id = 256
    start_id = 256
    identity = "delimited_bytes"

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes with these values, separators left out."""
        ids = np.asarray(ids)
        check_ids(ids, self.vocab_size, "the ids to decode")
        return ids[ids != self.separator_id].astype(np.uint8).tobytes()

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Returns 0 for a separator and 1 for a byte, int64, shape of `ids`."""
        return (np.asarray(ids) != self.separator_id).astype(np.int64)


class ByteTokenStream:
    """The token stream of a text stream whose tokens are its bytes; see `TokenStream`."""

    sample_len = 0

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


class DelimitedByteStream:
    """The bytes of a text stream with a separator after each document; see `TokenStream`."""

    def __init__(self, stream: TextStream, tokenizer: Tokenizer):
        """Wraps `stream`; costs 16 bytes a document."""
        stops = np.append(stream.document_starts[1:], stream.n_bytes)
        self.name = stream.name
        self.n_documents = stops.size
        self.n_tokens = stream.n_bytes + stops.size
        self.tokenizer = tokenizer
        self.sample_len = stream.sample_bytes + 1 if stream.sample_bytes else 0
        self._stream = stream
        self._stops = stops  # of each document, in the text
        self._separators = stops + np.arange(stops.size)  # positions among the tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start .. stop-1`, int32 [stop - start]; raises IndexError as `read`."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(
                f"a token range must lie within the stream: got [{start}, {stop}) of {self.name}, "
                f"which has {self.n_tokens} tokens"
            )
        first, last = np.searchsorted(self._separators, [start, stop]).tolist()
        ids = np.full(stop - start, self.tokenizer.separator_id, np.int32)
        is_byte = np.ones(stop - start, bool)
        is_byte[self._separators[first:last] - start] = False
        ids[is_byte] = self._stream.read(start - first, stop - last)
        return ids

    def document_index(self, positions: np.ndarray | int) -> np.ndarray:
        """Returns the document each position belongs to as an input, int64."""
        return np.searchsorted(self._separators, positions, side="right")

    def byte_offset(self, position: int) -> int:
        """Returns the number of bytes before the token at `position`."""
        return position - int(np.searchsorted(self._separators, position))

    def tokens_within(self, n_bytes: int) -> int:
        """Returns the number of tokens of the first `n_bytes`, with the separators among them."""
        n_bytes = min(n_bytes, self._stream.n_bytes)
        return n_bytes + int(np.searchsorted(self._stops, n_bytes, side="right"))
