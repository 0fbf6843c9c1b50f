"""SentencePiece sub-words as tokens, exact to the byte.

Text is never normalised: `decode(encode(text)) == text` for any bytes, and the lengths of a
document's tokens add up to its raw bytes, or encoding raises. Two things that SentencePiece itself
does not keep are written as byte tokens: U+2581, its stand-in for a space, and bytes that are not
UTF-8. Each document is followed by the model's end-of-sentence token. Not here: training a model
(`sentencepiece_training.py`) and the file of encoded text (`token_cache.py`).
"""

import codecs
import functools
import hashlib
import os
import pathlib
import re
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from longctx_jax.data.streams import TextStream
from longctx_jax.data.token_cache import EncodedText, fingerprint, load_or_encode
from longctx_jax.data.tokens import Tokenizer, check_ids

SPACE = "\u2581"  # how SentencePiece writes a space
CHUNK_BYTES = 1 << 16  # text handed to SentencePiece at once
BLOCK_BYTES = 1 << 22  # text of a long document in memory at once
_AS_BYTES = re.compile(f"([{SPACE}\udc80-\udcff]+)")  # U+DC80 + b: byte 80 + b that is not UTF-8


def import_sentencepiece() -> Any:
    """Returns the package `sentencepiece`; raises ImportError naming the extra that has it."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError(
            "a SentencePiece model in config.data.tokenizer needs the package sentencepiece, which "
            f'cannot be imported ({error}); run `pip install "longctx_jax[text]"`, or set '
            "config.data.tokenizer='bytes'"
        ) from error
    return sentencepiece


def load_tokenizer(path: pathlib.Path) -> "SentencePieceTokenizer":
    """Returns the tokenizer of the model file at `path`; the same object until the file changes."""
    stat = path.stat()
    return _load_once(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _load_once(path: pathlib.Path, mtime_ns: int, n_bytes: int) -> "SentencePieceTokenizer":
    del mtime_ns, n_bytes
    return SentencePieceTokenizer(path)


class SentencePieceTokenizer:
    """The tokens of a SentencePiece model with byte fallback; see `Tokenizer`.

    Encoded text is kept in the folder `FILE.model.tokens` beside the model.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Reads the model file.

        Raises:
            ImportError: if sentencepiece is not installed.
            ValueError: if it is no model, or one without byte fallback or end-of-sentence token.
        """
        self._path = pathlib.Path(path)
        self.name = str(path)
        model = self._path.read_bytes()
        self._digest = hashlib.sha256(model).hexdigest()
        self._processor = _open_model(model, self.name)
        self.vocab_size = self._processor.vocab_size()
        self.separator_id = self._processor.eos_id()
        self._byte_ids = _byte_ids(self._processor, self.name)
        if self.separator_id < 0:
            raise ValueError(
                f"a SentencePiece model must have an end-of-sentence token: {path} has none; "
                "train one with scripts.train_tokenizer"
            )
        self._text = [_text_of(self._processor, index) for index in range(self.vocab_size)]
        self._n_bytes = np.array([len(text) for text in self._text], np.int64)
        self._streams: weakref.WeakKeyDictionary[TextStream, SentencePieceStream] = (
            weakref.WeakKeyDictionary()
        )

    def encode(self, text: bytes | str) -> np.ndarray:
        """Returns the ids of `text` (a `str` is encoded as UTF-8), int32 [n_tokens].

        Raises:
            ValueError: if the model changes this text, so that it cannot be decoded exactly.
        """
        raw = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        parts: list[str] = []
        for start, stop in cut_at_spaces(raw, CHUNK_BYTES):
            # Even parts are for SentencePiece, odd ones become byte tokens.
            parts += _AS_BYTES.split(raw[start:stop].decode("utf-8", "surrogateescape")) + [""]
        plain = [part for part in parts[::2] if part]
        encoded = iter(self._processor.encode(plain, out_type=int) if plain else ())
        pieces: list[Any] = [[]]
        for index, part in enumerate(parts):
            if part and index % 2 == 0:
                pieces.append(next(encoded))
            elif part:
                pieces.append(self._byte_ids[list(part.encode("utf-8", "surrogateescape"))])
        ids = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
        self._require_exact(raw, ids)
        return ids

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes that `ids` stand for, none for control tokens such as the separator.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        ids = np.asarray(ids)
        check_ids(ids, self.vocab_size, "the ids to decode")
        return b"".join(map(self._text.__getitem__, ids.tolist()))

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Returns how many raw text bytes each id stands for, int64, shape of `ids`."""
        return self._n_bytes[np.asarray(ids)]

    def stream(self, stream: TextStream) -> "SentencePieceStream":
        """Returns `stream` as tokens, encoded on first use and kept on disk."""
        if stream not in self._streams:
            key = {
                "name": stream.name,
                "model": self._digest,
                "n_bytes": stream.n_bytes,
                "n_documents": int(stream.document_starts.size),
                "text": fingerprint(stream),
            }
            encoded = load_or_encode(
                self._path.with_name(f"{self._path.name}.tokens"),
                key,
                self._encode_documents(stream),
                self.vocab_size,
            )
            self._streams[stream] = SentencePieceStream(stream, self, encoded)
        return self._streams[stream]

    def _encode_documents(self, stream: TextStream) -> Iterator[Iterable[np.ndarray]]:
        stops = np.append(stream.document_starts[1:], stream.n_bytes)
        for start, stop in zip(stream.document_starts.tolist(), stops.tolist(), strict=True):
            yield self._encode_document(stream, start, stop)

    def _encode_document(self, stream: TextStream, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields the ids of bytes `start .. stop-1` in pieces, and the separator."""
        while start < stop:
            raw = stream.read(start, min(start + BLOCK_BYTES, stop)).tobytes()
            if start + len(raw) < stop:
                raw = raw[: _last_cut(raw)]
            try:
                yield self.encode(raw)
            except ValueError as error:
                raise ValueError(f"{stream.name} from byte {start} on: {error}") from error
            start += len(raw)
        yield np.array([self.separator_id], np.int32)

    def _require_exact(self, raw: bytes, ids: np.ndarray) -> None:
        decoded = self.decode(ids)
        if decoded != raw:
            first = len(os.path.commonprefix([raw, decoded]))
            around = slice(max(first - 10, 0), first + 10)
            raise ValueError(
                f"a SentencePiece model must keep text as it is, for bits per byte of raw text: "
                f"{self.name} turns {raw[around]!r} into {decoded[around]!r}; use a model "
                "without normalisation and dummy prefix, as scripts.train_tokenizer makes"
            )


class SentencePieceStream:
    """The encoded documents of a text stream, a separator after each; see `TokenStream`."""

    sample_len = 0

    def __init__(self, stream: TextStream, tokenizer: Tokenizer, encoded: EncodedText):
        """Keeps what it needs of `stream`, which may be forgotten."""
        self.name = stream.name
        self.n_tokens = encoded.ids.size
        self.n_documents = encoded.separators.size
        self.tokenizer = tokenizer
        self._ids = encoded.ids
        self._separators = encoded.separators
        self._document_starts = stream.document_starts  # bytes
        self._n_bytes = stream.n_bytes

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns tokens `start .. stop-1`, int32 [stop - start]."""
        if not 0 <= start <= stop <= self.n_tokens:
            raise IndexError(
                f"a token range must lie within the stream: got [{start}, {stop}) of {self.name}, "
                f"which has {self.n_tokens} tokens"
            )
        return self._ids[start:stop].astype(np.int32)

    def document_index(self, positions: np.ndarray | int) -> np.ndarray:
        """Returns the document each position belongs to as an input, int64."""
        return np.searchsorted(self._separators, positions, side="right")

    def byte_offset(self, position: int) -> int:
        """Returns where in the text the token begins; costs a pass over its document."""
        document = int(np.searchsorted(self._separators, position))
        if document == self.n_documents:
            return self._n_bytes
        first = self._first_token(document)
        n_bytes = self.tokenizer.token_bytes(self._ids[first:position]).sum()
        return int(self._document_starts[document] + n_bytes)

    def tokens_within(self, n_bytes: int) -> int:
        """Returns how many whole tokens the first `n_bytes` hold; costs a pass over a document."""
        if n_bytes >= self._n_bytes:
            return self.n_tokens
        document = int(np.searchsorted(self._document_starts, n_bytes, side="right")) - 1
        first = self._first_token(document)
        ids = self._ids[first : int(self._separators[document])]
        ends = np.cumsum(self.tokenizer.token_bytes(ids)) + self._document_starts[document]
        return first + int(np.searchsorted(ends, n_bytes, side="right"))

    def _first_token(self, document: int) -> int:
        return int(self._separators[document - 1]) + 1 if document else 0


def cut_at_spaces(raw: bytes, n_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields the bounds of consecutive pieces of `raw` of at most `n_bytes`, all but the last cut.

    A piece ends before a run of spaces where it can, as sub-words do: cutting changes no token.
    """
    start = 0
    while start < len(raw):
        stop = min(start + n_bytes, len(raw))
        if stop < len(raw):
            stop = start + _last_cut(raw[start:stop])
        yield start, stop
        start = stop


def _last_cut(raw: bytes) -> int:
    """Returns the last place to cut `raw`, at least 1: before spaces, else before a character."""
    cut = raw.rfind(b" ")
    while cut > 0 and raw[cut - 1 : cut] == b" ":
        cut -= 1
    if cut > 0:
        return cut
    return codecs.utf_8_decode(raw, "surrogateescape", False)[1] or len(raw)


def _open_model(model: bytes, name: str) -> Any:
    processor = import_sentencepiece().SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError(
            f"config.data.tokenizer must be a SentencePiece model file: {name} cannot be read "
            f"({error}); copy it again, or train one with scripts.train_tokenizer"
        ) from error
    return processor


def _byte_ids(processor: Any, name: str) -> np.ndarray:
    """Returns the id of each byte's token, int32 [256]."""
    ids = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    if not all(processor.is_byte(index) for index in ids):
        raise ValueError(
            f"a SentencePiece model must have byte fallback, so that it covers every text: {name} "
            "has none; train one with scripts.train_tokenizer"
        )
    return np.array(ids, np.int32)


def _text_of(processor: Any, index: int) -> bytes:
    """Returns the bytes that the token `index` stands for; none for a control token."""
    piece = processor.id_to_piece(index)
    if processor.is_byte(index):
        return bytes([int(piece[3:5], 16)])
    if processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
        return b""
    return piece.replace(SPACE, " ").encode("utf-8")
