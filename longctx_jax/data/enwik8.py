"""enwik8: the first 10^8 bytes of an English Wikipedia dump, and its 4,000,000-byte prefix.

The file is used raw, split 90M/5M/5M bytes by offset as in the published byte-level results. Its
length and md5 are checked before use. `enwik8_4m` is a set of its own for small experiments: its
numbers are not enwik8 numbers.
"""

import contextlib
import functools
import gzip
import hashlib
import http.client
import json
import pathlib
import struct
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, cast

import numpy as np
from absl import logging

from longctx_jax import json_files
from longctx_jax.data.files import write_atomically
from longctx_jax.data.splits import SPLIT_NAMES, Splits, resolve_data_dir, where_from
from longctx_jax.data.streams import map_file

ENWIK8_TRAIN_BYTES = 90_000_000
ENWIK8_VALIDATION_BYTES = 5_000_000
ENWIK8_TEST_BYTES = 5_000_000
ENWIK8_BYTES = 100_000_000
ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
ENWIK8_URL = "http://mattmahoney.net/dc/enwik8.zip"
DOWNLOAD_TIMEOUT_S = 20
DOWNLOAD_LOG_BYTES = 4_000_000  # between two progress lines

ENWIK8_4M_TRAIN_BYTES = 3_600_000
ENWIK8_4M_VALIDATION_BYTES = 200_000
ENWIK8_4M_TEST_BYTES = 200_000
ENWIK8_4M_BYTES = 4_000_000
ENWIK8_4M_SHA256 = "9f9ca3a41e2b87a0268d00380577e2c308e07959b22a94c8d7b1e8901bdefc37"

COPY_BYTES = 1 << 20
ARCHIVE_MAX_BYTES = 2 * ENWIK8_BYTES  # the published one has 36 million
# What gzip and zipfile raise for files that are none: RuntimeError where a password is needed.
ARCHIVE_ERRORS = (
    *(EOFError, KeyError, NotImplementedError, RuntimeError, ValueError, struct.error),
    *(OverflowError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error),
)
GET_ENWIK8 = f"fetch {ENWIK8_URL} and unpack it"
GET_PREFIX = "write it with `head -c 4000000 enwik8 > enwik8_4m`"


TEXT8_BYTES = (90_000_000, 5_000_000, 5_000_000)  # train, validation, test, as in the literature
TEXT8_CHARACTERS = np.frombuffer(b" abcdefghijklmnopqrstuvwxyz", np.uint8)


def load_enwik8(data_dir: str, *, download: bool) -> Splits:
    """Returns enwik8's splits, unpacking or downloading the file if need be.

    Args:
        data_dir: `config.data.data_dir`; the file, `.gz` or `.zip` lies there or in `enwik8/`.
        download: `config.data.download`; try the network if the file is nowhere.

    Raises:
        FileNotFoundError: if the file is missing and cannot be downloaded.
        ValueError: if a file is there but is not enwik8.
    """
    root = resolve_data_dir(data_dir)
    path = _find(root, "enwik8", "")
    if path is None:
        archive = _find(root, "enwik8", ".gz") or _find(root, "enwik8", ".zip")
        if archive is None:
            archive = _obtain(root, where_from(data_dir), download)
        path = _unpack(archive)
    _verify_once(path)
    sizes = (ENWIK8_TRAIN_BYTES, ENWIK8_VALIDATION_BYTES, ENWIK8_TEST_BYTES)
    return _split_by_offset("enwik8", path, sizes)


def load_enwik8_4m(data_dir: str) -> Splits:
    """Returns the splits of the 4,000,000-byte prefix: 3,600,000/200,000/200,000 bytes.

    Raises:
        FileNotFoundError: if `enwik8_4m` is neither in the data folder nor in `enwik8_4m/`.
        ValueError: if the file has another size or sha256.
    """
    root = resolve_data_dir(data_dir)
    path = _find(root, "enwik8_4m", "")
    if path is None:
        raise FileNotFoundError(
            f"enwik8_4m must be a file in {root} or {root / 'enwik8_4m'} ({where_from(data_dir)}): "
            f"it is in neither; {GET_PREFIX} and put it there, or set config.data.data_dir"
        )
    _require(path, ENWIK8_4M_BYTES, "sha256", ENWIK8_4M_SHA256, GET_PREFIX)
    sizes = (ENWIK8_4M_TRAIN_BYTES, ENWIK8_4M_VALIDATION_BYTES, ENWIK8_4M_TEST_BYTES)
    return _split_by_offset("enwik8_4m", path, sizes)


def load_text8(data_dir: str) -> Splits:
    """Returns the splits of text8: 90,000,000/5,000,000/5,000,000 bytes of a-z and spaces.

    Raises:
        FileNotFoundError: if `text8` is neither in the data folder nor in `text8/`.
        ValueError: if the file has another size, or another character.
    """
    root = resolve_data_dir(data_dir)
    path = _find(root, "text8", "")
    if path is None:
        raise FileNotFoundError(
            f"text8 must be a file in {root} or {root / 'text8'} ({where_from(data_dir)}): it is "
            "in neither; unpack text8.zip there, or set config.data.data_dir"
        )
    size = path.stat().st_size
    if size != sum(TEXT8_BYTES):
        raise ValueError(
            f"text8 must have {sum(TEXT8_BYTES)} bytes: {path} has {size}; unpack text8.zip again"
        )
    seen = np.unique(np.memmap(path, np.uint8, "r"))
    others = seen[~np.isin(seen, TEXT8_CHARACTERS)]
    if others.size:
        raise ValueError(
            f"text8 must hold a-z and spaces alone: {path} has the byte {int(others[0])}; unpack "
            "text8.zip again"
        )
    return _split_by_offset("text8", path, TEXT8_BYTES)


def _find(root: pathlib.Path, name: str, suffix: str) -> pathlib.Path | None:
    """Returns the file `name + suffix` in `root` or `root/name`, or None."""
    candidates = (root / f"{name}{suffix}", root / name / f"{name}{suffix}")
    return next((path for path in candidates if path.is_file()), None)


def _split_by_offset(name: str, path: pathlib.Path, sizes: tuple[int, ...]) -> Splits:
    build = {}
    start = 0
    for split, size in zip(SPLIT_NAMES, sizes, strict=True):
        build[split] = functools.partial(map_file, f"{name}/{split}", path, start, start + size)
        start += size
    return Splits(name, build)


def _require(path: pathlib.Path, n_bytes: int, algorithm: str, expected: str, remedy: str) -> None:
    """Raises ValueError unless the file has this size and this digest."""
    size = path.stat().st_size
    if size != n_bytes:
        kind = "truncated" if size < n_bytes else "too long"
        raise ValueError(
            f"{path.name} must have {n_bytes} bytes: {path} has {size} ({kind}); "
            f"delete it, then {remedy}"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    if digest != expected:
        raise ValueError(
            f"{path.name} must have {algorithm} {expected}: {path} has {digest}; "
            f"it is another or a damaged file: delete it, then {remedy}"
        )


def _verify_once(path: pathlib.Path) -> None:
    """Checks the file, or trusts the note left beside it by an earlier check of the same file."""
    stat = path.stat()
    facts = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "md5": ENWIK8_MD5}
    note = path.with_name(f"{path.name}.verified.json")
    try:
        if stat.st_size == ENWIK8_BYTES and json_files.read_object(note, remedy="") == facts:
            return
    except (OSError, ValueError):
        pass  # No note, or not ours: check again.
    _require(path, ENWIK8_BYTES, "md5", ENWIK8_MD5, GET_ENWIK8)
    try:
        write_atomically(note, lambda file: file.write(json.dumps(facts).encode()))
    except OSError as error:
        logging.info("enwik8 check_not_noted path=%s reason=%s", note, error)


def _unpack(archive: pathlib.Path) -> pathlib.Path:
    """Returns `enwik8` written beside `archive`, a `.gz` or `.zip`; only a right file appears."""
    target = archive.with_suffix("")
    if target.is_dir():
        target = target / "enwik8"
    remedy = f"delete {archive}, then {GET_ENWIK8}"
    if archive.stat().st_size > ARCHIVE_MAX_BYTES:
        raise ValueError(
            f"{archive} must be an archive of enwik8, of at most {ARCHIVE_MAX_BYTES} bytes: it has "
            f"{archive.stat().st_size}; {remedy}"
        )
    logging.info("enwik8 unpacking archive=%s target=%s", archive, target)

    def check(temporary: pathlib.Path) -> None:
        try:
            _require(temporary, ENWIK8_BYTES, "md5", ENWIK8_MD5, GET_ENWIK8)
        except ValueError as error:
            message = str(error).replace(str(temporary), f"the content of {archive}")
            raise ValueError(message.replace(temporary.name, "enwik8")) from None

    try:
        with _damage_named(archive, remedy):
            packed = _open_archive(archive)

        def write(file: IO[bytes]) -> None:
            with _damage_named(archive, remedy):
                _copy(packed, file, limit=ENWIK8_BYTES)

        with packed:
            write_atomically(target, write, check)
    except PermissionError as error:
        raise PermissionError(
            f"{archive} must be unpacked beside itself, and its folder cannot be written "
            f"({error}); unpack it elsewhere and set config.data.data_dir to that folder"
        ) from error
    return target


@contextlib.contextmanager
def _damage_named(archive: pathlib.Path, remedy: str) -> Iterator[None]:
    """Whatever reading an archive raises becomes a ValueError that names the file."""
    try:
        yield
    except ARCHIVE_ERRORS as error:
        raise ValueError(
            f"{archive} must be a whole archive of enwik8: it has {archive.stat().st_size} bytes "
            f"and cannot be unpacked ({error}); {remedy}"
        ) from error


def _open_archive(archive: pathlib.Path) -> IO[bytes]:
    if archive.suffix == ".gz":
        return cast(IO[bytes], gzip.open(archive, "rb"))
    with zipfile.ZipFile(archive) as packed:  # The member keeps its own handle open.
        kind = packed.getinfo("enwik8").compress_type
        if kind not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others take memory as they say
            raise zipfile.BadZipFile(f"compressed by method {kind}, not deflated")
        return packed.open("enwik8")


def _copy(source: IO[bytes], target: IO[bytes], *, limit: int) -> None:
    """Copies `source`, stopping soon after `limit` bytes: enough to see that it is too long."""
    n_bytes = 0
    while n_bytes <= limit and (data := source.read(COPY_BYTES)):
        target.write(data)
        n_bytes += len(data)


def _obtain(root: pathlib.Path, chosen_by: str, download: bool) -> pathlib.Path:
    """Returns `enwik8.zip` after downloading it into `root`, or says what to put where."""
    archive = root / "enwik8.zip"
    reason = "config.data.download is False"
    if download:
        try:
            root.mkdir(parents=True, exist_ok=True)
            write_atomically(archive, _download)
            return archive
        except (OSError, http.client.HTTPException) as error:
            reason = f"downloading {ENWIK8_URL} failed ({type(error).__name__}: {error})"
    raise FileNotFoundError(
        f"enwik8, enwik8.gz or enwik8.zip must be in {root} or {root / 'enwik8'} ({chosen_by}): "
        f"none is there, and {reason}; fetch {ENWIK8_URL} by other means and put it at {archive}, "
        "or set config.data.data_dir to the folder that has it"
    )


def _download(target: IO[bytes]) -> None:
    """Writes the published archive to `target`, logging progress; raises OSError on a short one."""
    logging.info("enwik8 downloading url=%s", ENWIK8_URL)
    with urllib.request.urlopen(ENWIK8_URL, timeout=DOWNLOAD_TIMEOUT_S) as response:
        expected = int(response.headers.get("Content-Length") or 0)
        n_bytes = logged = 0
        while data := response.read(COPY_BYTES):
            target.write(data)
            n_bytes += len(data)
            if n_bytes - logged >= DOWNLOAD_LOG_BYTES:
                logging.info("enwik8 downloading bytes=%d of=%d", n_bytes, expected)
                logged = n_bytes
    if n_bytes < expected:
        raise OSError(f"the connection ended after {n_bytes} of {expected} bytes")
