"""The user's own files as documents: plain, compressed, and tables of texts.

| name ends in | read as |
| --- | --- |
| .jsonl, .ndjson | a document a line: its field `config.data.text_field` |
| .parquet | a document a row: its column `config.data.text_field` |
| .gz, .bz2, .xz, .zst after any name | what the name without it is read as |
| anything else | one document, its bytes |

A folder means the files below it, hidden ones left out. What is not text is refused by name: files
with zero bytes in their beginning (archives, images, UTF-16, UTF-32). Plain files are mapped;
compressed files and tables are read into memory, whole.
"""

import bz2
import glob
import gzip
import importlib
import io
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from longctx_jax.data.streams import FileStream, TextStream, concatenate

LOOKED_AT_BYTES = 1 << 16  # of a file, for what text has not
LINES = (".jsonl", ".ndjson")
TABLES = (".parquet",)
# Raised by the packages for files that are damaged or something else.
DAMAGED = (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error)


def _zstd(raw: bytes) -> bytes:
    """Decompresses Zstandard, by the standard library of Python 3.14 or the package zstandard."""
    try:
        return importlib.import_module("compression.zstd").decompress(raw)
    except ImportError:
        pass
    try:
        package = importlib.import_module("zstandard")
    except ImportError as error:
        raise ImportError(
            "a .zst file in config.data.files needs Python 3.14 or the package zstandard: neither "
            "is here; `pip install zstandard`, or unpack the file"
        ) from error
    return package.ZstdDecompressor().stream_reader(io.BytesIO(raw)).read()


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
    ".zst": _zstd,
}


def open_files(name: str, patterns: tuple[str, ...], *, field: str, text_field: str) -> TextStream:
    """Returns the documents of all files that match, sorted by name, each file once.

    Args:
        name: of the stream.
        patterns: file names, folders or globs.
        field: of the config, for messages.
        text_field: of a line or row, what holds the text.

    Raises:
        FileNotFoundError: a pattern that matches nothing.
        ValueError: no text, or a file that is none.
    """
    paths = find_files(patterns, field)
    for path in paths:
        if _kind(path)[1] == "":
            _require_text(path, _beginning(path), field)
    if all(_kind(path) == ("", "") for path in paths):
        return FileStream(name, paths)
    documents = [document for path in paths for document in read_documents(path, field, text_field)]
    stream = [document for document in documents if document]
    if not stream:
        raise ValueError(f"{field} must hold text: {patterns} have none; name other files")
    return concatenate(name, stream)


def find_files(patterns: tuple[str, ...], field: str) -> list[str]:
    """Returns the non-empty files that names, folders or globs match, sorted, each once."""
    if isinstance(patterns, str):
        raise TypeError(
            f"{field} must be a tuple of file names or globs: got the string {patterns!r}; write "
            f"({patterns!r},)"
        )
    if not patterns:
        raise ValueError(
            f"config.data.name='text' needs {field}: got (); set it to file names, folders or "
            "globs, e.g. ('~/books/*.txt',)"
        )
    found: set[str] = set()
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        # A name may hold glob characters: what exists is taken as it is.
        names = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
        files = [os.path.abspath(path) for name in names for path in _below(name)]
        if not files:
            raise FileNotFoundError(
                f"each entry of {field} must match a file: {pattern!r} matches none from "
                f"{os.getcwd()}; correct the name or glob"
            )
        found.update(files)
    files = [path for path in sorted(found) if os.path.getsize(path)]
    if not files:
        raise ValueError(
            f"{field} must hold text: the {len(found)} files that {patterns} match are empty; "
            "name other files"
        )
    return files


def _below(name: str) -> Iterator[str]:
    """Yields a file, or the files below a folder that are not hidden."""
    if os.path.isfile(name):
        yield name
    for folder, folders, files in os.walk(name):
        folders[:] = [each for each in folders if not each.startswith(".")]
        yield from (os.path.join(folder, each) for each in files if not each.startswith("."))


def read_documents(path: str, field: str, text_field: str) -> Iterator[bytes]:
    """Yields the documents of a file, read whole."""
    compression, form = _kind(path)
    raw = pathlib.Path(path).read_bytes()
    if compression:
        try:
            raw = COMPRESSIONS[compression](raw)
        except DAMAGED as error:
            raise ValueError(
                f"{field}: {path} is no whole {compression} file ({error}); fetch it again"
            ) from error
    if form in TABLES:
        yield from _rows(path, raw, text_field)
        return
    _require_text(path, raw[:LOOKED_AT_BYTES], field)
    if form in LINES:
        yield from _lines(path, raw, text_field)
    else:
        yield raw


def _lines(path: str, raw: bytes, text_field: str) -> Iterator[bytes]:
    for number, line in enumerate(raw.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: line {number} is no JSON ({error}); fetch the file again"
            ) from error
        text = value.get(text_field) if isinstance(value, dict) else None
        yield _text(text, path, f"line {number}", text_field)


def _rows(path: str, raw: bytes, text_field: str) -> Iterator[bytes]:
    parquet = importlib.import_module("pyarrow.parquet")
    try:
        file = parquet.ParquetFile(io.BytesIO(raw))
        names = file.schema_arrow.names
    except Exception as error:  # whatever pyarrow says of a file that is none
        raise ValueError(f"{path} is no parquet file ({error}); fetch it again") from error
    if text_field not in names:
        raise ValueError(
            f"config.data.text_field must be a column of {path}: got {text_field!r}, it has "
            f"{names}; set it to one of them"
        )
    number = 0
    for batch in file.iter_batches(columns=[text_field]):
        for value in batch.column(0).to_pylist():
            yield _text(value, path, f"row {number}", text_field)
            number += 1


def _text(value: Any, path: str, where: str, text_field: str) -> bytes:
    if not isinstance(value, str):
        raise ValueError(
            f"config.data.text_field={text_field!r} must be text in every line or row: {where} of "
            f"{path} has {value!r:.100}; set it to the field that holds the text"
        )
    return value.encode("utf-8", "surrogatepass")


def _kind(path: str) -> tuple[str, str]:
    """Returns the suffix of the compression and of the form, "" for none."""
    plain, last = os.path.splitext(path)
    compression = last.lower() if last.lower() in COMPRESSIONS else ""
    form = os.path.splitext(plain if compression else path)[1].lower()
    return compression, form if form in LINES + TABLES else ""


def _beginning(path: str) -> bytes:
    if _kind(path)[0]:
        return b""
    with open(path, "rb") as file:
        return file.read(LOOKED_AT_BYTES)


def _require_text(path: str, beginning: bytes, field: str) -> None:
    """Raises ValueError for zero bytes, which no text in a byte-wise encoding has."""
    if b"\0" in beginning:
        marks = (b"\xff\xfe", b"\xfe\xff")
        kind = "UTF-16 or UTF-32" if beginning.startswith(marks) else "binary"
        raise ValueError(
            f"{field} must name texts: {path} is {kind}, it has zero bytes in its beginning; "
            "convert it to UTF-8, or leave it out"
        )
