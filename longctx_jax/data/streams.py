"""Immutable streams of raw text bytes with random access and document boundaries.

A `TextStream` is what every data source becomes: bytes `0 .. n_bytes-1`, cut into documents. Two
forms exist: one array (in memory or memory-mapped) and many files mapped when first read. Not here:
where the bytes come from (`sources.py` and the files beside it) and tokens (`tokenizers.py`).
"""

import abc
import codecs
import collections
import os
import threading
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

CHECK_ALL_MAX_BYTES = 256_000_000  # file streams up to this size are checked whole when built
OPEN_FILES = 64  # memory maps a file stream keeps
UTF8_CHUNK_BYTES = 1 << 24


class TextStream(abc.ABC):
    """Bytes of text in a fixed order, made of documents; safe to read from several threads.

    Attributes:
        name: what messages call it, e.g. `enwik8/train`.
        n_bytes: length of the stream, at least 1.
        document_starts: int64 [n_documents], offset of each document's first byte, strictly
            increasing; the first is 0.
        sample_bytes: length of each document if documents are samples of one size, such as images,
            that only make sense whole and apart; 0 = text.
    """

    sample_bytes: int = 0

    def __init__(self, name: str, n_bytes: int, document_starts: np.ndarray):
        """Stores the three facts; raises ValueError if they contradict each other."""
        starts = np.array(document_starts, np.int64)
        if n_bytes < 1:
            raise ValueError(f"a text stream must have at least one byte: {name} has {n_bytes}")
        ordered = starts.ndim == 1 and starts.size > 0 and bool(np.all(np.diff(starts) > 0))
        if not ordered or starts[0] != 0 or starts[-1] >= n_bytes:
            raise ValueError(
                "document_starts must begin with 0 and increase strictly up to n_bytes: "
                f"got {starts[:5]}... for {name} with n_bytes={n_bytes}"
            )
        starts.flags.writeable = False
        self.name = name
        self.n_bytes = int(n_bytes)
        self.document_starts = starts

    @property
    def mapped_files(self) -> Sequence[str]:
        """The files whose bytes are read as long as the stream is used."""
        return ()

    @abc.abstractmethod
    def _read(self, start: int, stop: int) -> np.ndarray:
        """Returns bytes `start .. stop-1`, uint8, for a range that was checked."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns bytes `start .. stop-1` as uint8 [stop - start], across documents.

        Raises:
            IndexError: if the range does not lie within the stream.
        """
        if not 0 <= start <= stop <= self.n_bytes:
            raise IndexError(
                f"a byte range must lie within the stream: got [{start}, {stop}) of {self.name}, "
                f"which has {self.n_bytes} bytes"
            )
        return self._read(start, stop)

    def document_index(self, positions: np.ndarray | int) -> np.ndarray:
        """Returns the index of the document each byte position belongs to, int64."""
        return np.searchsorted(self.document_starts, positions, side="right") - 1


class ArrayStream(TextStream):
    """A stream over one uint8 array, in memory or memory-mapped."""

    def __init__(
        self, name: str, data: np.ndarray, document_starts: Sequence[int] | np.ndarray = (0,)
    ):
        """Keeps a reference to `data`, uint8 [n_bytes], which must not change afterwards."""
        if data.dtype != np.uint8 or data.ndim != 1:
            raise TypeError(f"data must be uint8 [n_bytes]: {name} has {data.dtype} {data.shape}")
        super().__init__(name, data.size, np.asarray(document_starts))
        self._data = data

    @property
    def mapped_files(self) -> Sequence[str]:
        """As of any stream."""
        path = getattr(self._data, "filename", None)
        return () if path is None else (os.fspath(path),)

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._data[start:stop]


def map_file(
    name: str, path: str | os.PathLike, start: int = 0, stop: int | None = None
) -> ArrayStream:
    """Returns bytes `start .. stop-1` of one file, memory-mapped, as a single document."""
    return ArrayStream(name, np.memmap(path, np.uint8, "r")[start:stop])


def concatenate(name: str, documents: Sequence[bytes]) -> ArrayStream:
    """Returns an in-memory stream of the documents; empty ones are left out."""
    documents = [document for document in documents if document]
    starts = _starts([len(document) for document in documents])
    return ArrayStream(name, np.frombuffer(b"".join(documents), np.uint8), starts)


class FileStream(TextStream):
    """A stream over many files, each one document, mapped when first read.

    Construction costs one `stat` a file; the latest `OPEN_FILES` maps are kept.
    """

    def __init__(self, name: str, paths: Sequence[str | os.PathLike], *, check_utf8: bool = False):
        """Takes the files in the order given.

        Args:
            name: as `TextStream.name`.
            paths: the files; none may be empty.
            check_utf8: check each file's encoding when it is first opened, and at once if the
                stream has at most `CHECK_ALL_MAX_BYTES`.

        Raises:
            ValueError: for an empty file, or one that is not UTF-8.
        """
        sizes = [os.stat(path).st_size for path in paths]
        for path, size in zip(paths, sizes, strict=True):
            if size == 0:
                raise ValueError(
                    f"a document must have at least one byte: {path} is empty; "
                    "fetch the file again or remove it"
                )
        super().__init__(name, sum(sizes), _starts(sizes))
        self._paths = [os.fspath(path) for path in paths]
        self._stops = np.cumsum(sizes, dtype=np.int64)
        self._check_utf8 = check_utf8
        self._checked: set[int] = set()
        self._maps: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()
        if check_utf8 and self.n_bytes <= CHECK_ALL_MAX_BYTES:
            for index in range(len(self._paths)):
                self._open(index)

    def _read(self, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.zeros(0, np.uint8)
        first, last = self.document_index(np.array([start, stop - 1]))
        pieces = []
        for index in range(first, last + 1):
            begin = int(self.document_starts[index])
            end = min(stop, int(self._stops[index]))
            pieces.append(self._open(index)[max(start, begin) - begin : end - begin])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    @property
    def mapped_files(self) -> Sequence[str]:
        """As of any stream."""
        return self._paths

    def _open(self, index: int) -> np.ndarray:
        """Returns file `index` as a memory map, from the cache if it is there."""
        with self._lock:
            if index in self._maps:
                self._maps.move_to_end(index)
                return self._maps[index]
        data = np.memmap(self._paths[index], np.uint8, "r")
        expected = int(self._stops[index] - self.document_starts[index])
        if data.size != expected:
            raise ValueError(
                f"a file must not change while it is read: {self._paths[index]} had {expected} "
                f"bytes and now has {data.size}; start again"
            )
        if self._check_utf8 and index not in self._checked:
            require_utf8(data, self._paths[index])
        with self._lock:
            self._checked.add(index)
            self._maps[index] = data
            self._maps.move_to_end(index)
            while len(self._maps) > OPEN_FILES:
                self._maps.popitem(last=False)
        return data


class SliceStream(TextStream):
    """A view of bytes `start .. stop-1` of another stream; a cut document counts as one."""

    def __init__(self, name: str, parent: TextStream, start: int, stop: int):
        """Views `parent`; the range must lie within it and hold at least one byte."""
        if not 0 <= start < stop <= parent.n_bytes:
            raise ValueError(
                f"{name} must be a non-empty part of {parent.name}: got bytes [{start}, {stop}) "
                f"of {parent.n_bytes}"
            )
        inside = parent.document_starts[
            (parent.document_starts > start) & (parent.document_starts < stop)
        ]
        super().__init__(name, stop - start, np.concatenate([[0], inside - start]))
        self._parent = parent
        self._offset = start

    @property
    def mapped_files(self) -> Sequence[str]:
        """As of any stream."""
        return self._parent.mapped_files

    def _read(self, start: int, stop: int) -> np.ndarray:
        return self._parent.read(self._offset + start, self._offset + stop)


class FilesUnchanged:
    """Called later, raises if a file of a stream has been written since this object was made.

    Mapped files are read as they are now: a text overwritten in place would go on as another one.
    """

    def __init__(self, stream: TextStream):
        """Notes size, time and inode of the files."""
        self._before = {path: _state(path) for path in stream.mapped_files}

    def __call__(self) -> None:
        """Raises ValueError naming the first file that has changed; costs a `stat` a file."""
        for path, state in self._before.items():
            now = _state(path)
            if now is not None and now != state:
                raise ValueError(
                    f"a text must not change while a run reads it: {path} has been written since "
                    "the start; put the old file back and start again, which goes on from the "
                    "last checkpoint"
                )


def _state(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:  # gone: what is mapped stays readable
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino


def require_utf8(data: np.ndarray, path: str | os.PathLike) -> None:
    """Raises ValueError naming the file and the first bad byte unless `data` is UTF-8.

    Args:
        data: uint8 [n_bytes], the whole file.
        path: the file, for the message.
    """
    view = memoryview(cast(Any, data))
    start = 0
    while start < len(view):
        stop = min(start + UTF8_CHUNK_BYTES, len(view))
        try:
            # A character cut by the chunk's end is left for the next chunk.
            start += codecs.utf_8_decode(view[start:stop], "strict", stop == len(view))[1]
        except UnicodeDecodeError as error:
            offset = start + error.start
            raise ValueError(
                f"a book must be valid UTF-8: {path} has byte 0x{view[offset]:02x} at offset "
                f"{offset} ({error.reason}); fetch the file again, or convert it with "
                f"`iconv -f latin1 -t utf-8`"
            ) from None


def _starts(sizes: Sequence[int]) -> np.ndarray:
    """Returns where each of consecutive documents of these sizes begins, int64."""
    return np.cumsum([0, *sizes], dtype=np.int64)[:-1]


def count_words(stream: TextStream, n_bytes: int = 0, *, piece_bytes: int = 1 << 24) -> int:
    """Returns how many whitespace-separated words the first n_bytes hold (0 = the whole stream).

    Space, tab, newline, carriage return, vertical tab and form feed separate words, and so does the
    end of a document. A word cut by n_bytes counts as one. Constant memory: piece_bytes are read at
    a time.
    """
    is_space = np.zeros(256, bool)
    is_space[list(b" \t\n\r\v\f")] = True
    end = min(n_bytes, stream.n_bytes) if n_bytes else stream.n_bytes
    n_words, previous_is_space = 0, True
    for start in range(0, end, piece_bytes):
        spaces = is_space[stream.read(start, min(start + piece_bytes, end))]
        before = np.concatenate([[previous_is_space], spaces[:-1]])
        first, last = np.searchsorted(stream.document_starts, [start, start + spaces.size])
        before[stream.document_starts[first:last] - start] = True
        n_words += int(np.sum(before & ~spaces))
        previous_is_space = bool(spaces[-1])
    return n_words
