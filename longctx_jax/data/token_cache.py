"""Encoded text on disk: one file a stream, written once, mapped afterwards.

Layout: a JSON header padded to `HEADER_BYTES`, the ids (uint16 where they fit, else int32), the
position of each document's separator (int64). The header holds what the ids were made from and a
checksum of the rest. A file that is not what it should be is written anew, never used.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import time
import weakref
import zlib
from collections.abc import Iterable
from typing import IO, Any

import numpy as np
from absl import logging

from longctx_jax import json_files
from longctx_jax.data.files import write_atomically
from longctx_jax.data.streams import TextStream

FORMAT = "longctx_jax tokens 1"
HEADER_BYTES = 4096
DTYPES = ("uint16", "int32")
CHECK_BYTES = 1 << 24  # read at once for the checksum; ids looked at at once
LOG_EVERY_S = 30.0

Documents = Iterable[Iterable[np.ndarray]]  # pieces of ids of each document, separator included


@dataclasses.dataclass(frozen=True)
class EncodedText:
    """The ids of a stream and where its documents end."""

    ids: np.ndarray  # uint16 or int32 [n_tokens], memory-mapped
    separators: np.ndarray  # int64 [n_documents], position of the token that ends each document


class DamagedCacheError(ValueError):
    """A cache file is not what its name says."""


def load_or_encode(
    folder: pathlib.Path, key: dict[str, Any], documents: Documents, vocab_size: int
) -> EncodedText:
    """Returns the encoded text that `key` describes, from `folder` or else by encoding.

    Args:
        folder: of the cache; made if missing.
        key: what the ids depend on, JSON values; `key["name"]` also names the file.
        documents: the encoding, read only if there is no good file.
        vocab_size: ids are below.

    Raises:
        PermissionError: if the folder cannot be written.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    path = folder / f"{re.sub(r'[^A-Za-z0-9._]+', '-', key['name'])}-{digest[:16]}.tokens"
    try:
        return _load(path, key, vocab_size)
    except FileNotFoundError:
        pass
    except DamagedCacheError as error:
        logging.warning("tokens cache_damaged path=%s reason=%s; encoding again", path, error)
    dtype = np.uint16 if vocab_size <= 2**16 else np.int32
    logging.info("tokens encoding source=%s path=%s", key["name"], path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, functools.partial(_write, key, documents, np.dtype(dtype)))
    except PermissionError as error:
        raise PermissionError(
            f"the folder for encoded text must be writable: {folder} is not ({error}); set "
            "LONGCTX_TOKEN_CACHE to one that is"
        ) from error
    return _load(path, key, vocab_size)


def fingerprint(stream: TextStream) -> str:
    """Returns a digest of a stream's bytes and document boundaries, hex; the same object's once.

    Cost: one reading of the text, at the speed of the disk or about 1 GB/s; the log says how far.
    """
    if stream in _DIGESTS:
        return _DIGESTS[stream]
    digest = hashlib.sha256(stream.document_starts.tobytes())
    last = time.monotonic()
    for start in range(0, stream.n_bytes, CHECK_BYTES):
        digest.update(stream.read(start, min(start + CHECK_BYTES, stream.n_bytes)).tobytes())
        if time.monotonic() - last > LOG_EVERY_S:
            last = time.monotonic()
            logging.info("text=%s digested=%d of=%d bytes", stream.name, start, stream.n_bytes)
    _DIGESTS[stream] = digest.hexdigest()
    return _DIGESTS[stream]


_DIGESTS: weakref.WeakKeyDictionary[TextStream, str] = weakref.WeakKeyDictionary()


def _write(key: dict[str, Any], documents: Documents, dtype: np.dtype, file: IO[bytes]) -> None:
    file.write(bytes(HEADER_BYTES))
    n_tokens, checksum, last = 0, 0, time.monotonic()
    separators = []
    for document in documents:
        for ids in document:
            piece = ids.astype(dtype).tobytes()
            file.write(piece)
            checksum = zlib.crc32(piece, checksum)
            n_tokens += ids.size
        separators.append(n_tokens - 1)
        if time.monotonic() - last > LOG_EVERY_S:
            last = time.monotonic()
            logging.info(
                "tokens encoding source=%s documents=%d tokens=%d",
                key["name"],
                len(separators),
                n_tokens,
            )
    ends = np.array(separators, np.int64).tobytes()
    file.write(ends)
    header = {
        "format": FORMAT,
        "key": key,
        "dtype": dtype.name,
        "n_tokens": n_tokens,
        "n_documents": len(separators),
        "crc32": zlib.crc32(ends, checksum),
    }
    text = json.dumps(header).encode()
    assert len(text) <= HEADER_BYTES, "a header has a dozen short fields"
    file.seek(0)
    file.write(text.ljust(HEADER_BYTES))


def _load(path: pathlib.Path, key: dict[str, Any], vocab_size: int) -> EncodedText:
    """Returns the content of a cache file; costs two reads of it, the second from memory at best.

    Raises:
        FileNotFoundError: if there is none.
        DamagedCacheError: if it is not whole, not right or not of this key.
    """
    with path.open("rb") as file:
        n_tokens, n_documents, dtype, expected = _parse_header(file.read(HEADER_BYTES), key)
        checksum = 0
        while piece := file.read(CHECK_BYTES):
            checksum = zlib.crc32(piece, checksum)
    size = HEADER_BYTES + n_tokens * dtype.itemsize + n_documents * 8
    if path.stat().st_size != size or checksum != expected:
        raise DamagedCacheError("its length or checksum is wrong")
    ids = np.memmap(path, dtype, "r", HEADER_BYTES, (n_tokens,))
    offset = HEADER_BYTES + n_tokens * dtype.itemsize
    separators = np.fromfile(path, np.int64, n_documents, offset=offset)
    is_rising = separators[0] >= 0 and bool(np.all(np.diff(separators) > 0))
    if not is_rising or separators[-1] != n_tokens - 1:
        raise DamagedCacheError("its documents do not follow each other")
    for start in range(0, n_tokens, CHECK_BYTES):
        piece = ids[start : start + CHECK_BYTES]
        if piece.min() < 0 or piece.max() >= vocab_size:
            raise DamagedCacheError(f"it has ids outside a vocabulary of {vocab_size}")
    return EncodedText(ids, separators)


def _parse_header(raw: bytes, key: dict[str, Any]) -> tuple[int, int, np.dtype, int]:
    """Returns the numbers of tokens and documents, the type of ids, and the checksum.

    Raises:
        DamagedCacheError: if it is no header, or that of another key.
    """
    try:
        header = json_files.parse_object(raw, "its header", remedy="it is written anew")
    except ValueError as error:
        raise DamagedCacheError(str(error)) from error
    if header.get("format") != FORMAT or header.get("key") != key:
        raise DamagedCacheError("it was made from something else")
    counts = [header.get(name) for name in ("n_tokens", "n_documents", "crc32")]
    n_tokens, n_documents, checksum = (n if type(n) is int else -1 for n in counts)
    if header.get("dtype") not in DTYPES:
        raise DamagedCacheError("its header lacks the type of ids")
    if not 0 < n_documents <= n_tokens < 2**48:
        raise DamagedCacheError(f"it cannot have {n_tokens} tokens in {n_documents} documents")
    return n_tokens, n_documents, np.dtype(header["dtype"]), checksum
