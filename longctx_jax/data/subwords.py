"""Sub-words of a learned vocabulary as tokens, exact to the byte, whatever library cuts the text.

Text is never normalised: `decode(encode(text)) == text` for any bytes, and the lengths of a
document's tokens add up to its raw bytes, or encoding raises. Bytes that the library does not keep
are written as byte tokens, which every vocabulary here must have. Each document is followed by the
separator. Not here: the libraries (`sentencepiece.py`, `hf_tokenizer.py`) and the file of encoded
text (`token_cache.py`).
"""

import codecs
import functools
import os
import pathlib
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from longctx_jax.data.streams import TextStream
from longctx_jax.data.token_cache import EncodedText, fingerprint, load_or_encode
from longctx_jax.data.tokens import Tokenizer, check_ids

CHUNK_BYTES = 1 << 16  # text handed to the library at once
BLOCK_BYTES = 1 << 22  # text of a long document in memory at once
NOT_UTF8 = "\udc80-\udcff"  # U+DC80 + b: byte 80 + b that is not UTF-8
TOKEN_CACHE_VARIABLE = "LONGCTX_TOKEN_CACHE"


def token_folder(path: pathlib.Path, digest: str) -> pathlib.Path:
    """Returns where encoded text is kept: `FILE.tokens` beside the vocabulary, if that can be.

    Else, or for a vocabulary that lies read-only, `$LONGCTX_TOKEN_CACHE` or
    `~/.cache/longctx_jax/tokens`, in a folder named by the vocabulary's file and digest.
    """
    beside = path.with_name(f"{path.name}.tokens")
    chosen = os.environ.get(TOKEN_CACHE_VARIABLE, "")
    if not chosen and os.access(beside if beside.exists() else beside.parent, os.W_OK):
        return beside
    root = pathlib.Path(chosen or "~/.cache/longctx_jax/tokens").expanduser()
    return root / f"{path.name}-{digest[:16]}"


class SubwordTokenizer:
    """The tokens of a learned vocabulary; see `Tokenizer`.

    Encoded text is kept in the folder `FILE.tokens` beside the vocabulary's file.
    """

    kind = "a sub-word tokenizer"  # in messages
    remedy = "use another one"
    companions: tuple[str, ...] = ()  # files beside the vocabulary's that are read with it

    def __init__(
        self,
        path: pathlib.Path,
        *,
        digest: str,
        texts: Sequence[bytes],
        byte_ids: np.ndarray,
        separator_id: int,
        start_id: int,
        as_bytes: str = NOT_UTF8,
    ):
        """Keeps the vocabulary.

        Args:
            path: of its file.
            digest: of all that ids depend on.
            texts: the bytes each id stands for.
            byte_ids: the id of each byte's token, [256].
            separator_id: of the token after each document.
            start_id: what stands for it as an input.
            as_bytes: characters that become byte tokens, as inside the brackets of a pattern.
        """
        self.name = str(path)
        self.vocab_size = len(texts)
        self.separator_id = separator_id
        self.start_id = start_id
        self._path = path
        self._digest = digest
        self.identity = f"{digest} {separator_id} {start_id}"
        beside = [path.with_name(name) for name in self.companions]
        self.files = (path, *(other for other in beside if other.is_file()))
        self._texts = texts
        self._n_bytes = np.array([len(text) for text in texts], np.int64)
        self._byte_ids = byte_ids
        self._as_bytes = re.compile(f"([{as_bytes}]+)")
        self._streams: weakref.WeakKeyDictionary[TextStream, SubwordStream] = (
            weakref.WeakKeyDictionary()
        )

    def _encode_parts(self, parts: list[str]) -> Iterable[Sequence[int]]:
        """Returns the ids of each text by itself, without any special token."""
        raise NotImplementedError

    def encode(self, text: bytes | str) -> np.ndarray:
        """Returns the ids of `text` (a `str` is encoded as UTF-8), int32 [n_tokens].

        Raises:
            ValueError: if the library changes this text, so that it cannot be decoded exactly.
        """
        raw = text.encode("utf-8") if isinstance(text, str) else bytes(text)
        parts: list[str] = []
        for start, stop in cut_at_spaces(raw, CHUNK_BYTES):
            # Even parts are for the library, odd ones become byte tokens.
            parts += self._as_bytes.split(raw[start:stop].decode("utf-8", "surrogateescape")) + [""]
        plain = [part for part in parts[::2] if part]
        encoded = iter(self._encode_parts(plain) if plain else ())
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
        return b"".join(map(self._texts.__getitem__, ids.tolist()))

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Returns how many raw text bytes each id stands for, int64, shape of `ids`."""
        return self._n_bytes[np.asarray(ids)]

    def stream(self, stream: TextStream) -> "SubwordStream":
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
                token_folder(self._path, self._digest),
                key,
                self._encode_documents(stream),
                self.vocab_size,
            )
            self._streams[stream] = SubwordStream(stream, self, encoded)
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
                raw = raw[: last_cut(raw)]
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
                f"{self.kind} must keep text as it is, for bits per byte of raw text: {self.name} "
                f"turns {raw[around]!r} into {decoded[around]!r}; {self.remedy}"
            )


class SubwordStream:
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
            stop = start + last_cut(raw[start:stop])
        yield start, stop
        start = stop


def last_cut(raw: bytes) -> int:
    """Returns the last place to cut `raw`, at least 1: before spaces, else before a character.

    Only where the space is the first of its run of white space: patterns that words are found with
    take such a run, line breaks included, as one.
    """
    cut = raw.rfind(b" ")
    while cut > 0:
        if not raw[max(cut - 4, 0) : cut].decode("utf-8", "ignore")[-1:].isspace():
            return cut
        cut = raw.rfind(b" ", 0, cut)
    return codecs.utf_8_decode(raw, "surrogateescape", False)[1] or len(raw)


def load_once(
    load: Callable[[pathlib.Path], SubwordTokenizer], path: pathlib.Path
) -> SubwordTokenizer:
    """Returns load(path); the same object until the file changes."""
    stat = path.stat()
    return _load_once(load, path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _load_once(load: Any, path: pathlib.Path, mtime_ns: int, n_bytes: int) -> SubwordTokenizer:
    del mtime_ns, n_bytes
    return load(path)
