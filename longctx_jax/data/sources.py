"""Data sets by name: `load_source`, and the two that need no download.

`python_source` is the installed Python standard library, so every machine has real text; its bytes
depend on the Python version, so numbers on it compare only within one. `text` is the user's files.
The others live in `enwik8.py`, `pg19.py`, `imagenet64.py`, `tfds_source.py` and `recall.py`.
"""

import functools
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Callable
from typing import Any, Protocol

from absl import logging

from longctx_jax.data import enwik8, imagenet64, pg19, recall, tfds_source
from longctx_jax.data.splits import SPLIT_NAMES, Splits
from longctx_jax.data.streams import SliceStream, TextStream, concatenate
from longctx_jax.data.text_files import open_files

PYTHON_SOURCE_MIN_BYTES = 1_000_000
PYTHON_SOURCE_MAX_BYTES = 30_000_000
# Share of the files, in 1/1000: train below the first bound, validation below the second.
PYTHON_SOURCE_BOUNDS = (900, 950)
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


class DataConfig(Protocol):
    """The fields of `config.data` that a source may read."""

    name: str
    data_dir: str
    files: tuple[str, ...]
    validation_files: tuple[str, ...]
    test_files: tuple[str, ...]
    text_field: str
    validation_fraction: float
    test_fraction: float
    download: bool
    seq_len: int  # recall tasks only, as the next
    recall: Any


def load_source(config_data: DataConfig) -> Splits:
    """Returns the splits `train`, `validation` and `test` of the data set `config_data.name`.

    Args:
        config_data: `config.data`, or any object with its attributes.

    Raises:
        ValueError: for an unknown name, or data that is not what it should be.
        FileNotFoundError: for data that is not there, with how to get it.
    """
    name = config_data.name
    if name not in SOURCES:
        raise ValueError(
            f"config.data.name must be one of {sorted(SOURCES)}: got {name!r}; "
            "set it to one of them"
        )
    return SOURCES[name](config_data)


def load_python_source(config_data: DataConfig) -> Splits:
    """Returns the standard library's `.py` files, split by a hash of each file's path.

    About 90/5/5 by file, 10 to 30 MB, sorted by path within a split; each file is a document.
    """
    del config_data
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = _read_python_files(root)
    total = sum(map(len, files.values()))
    if total < PYTHON_SOURCE_MIN_BYTES:
        raise FileNotFoundError(
            f"python_source needs at least {PYTHON_SOURCE_MIN_BYTES} bytes of .py files: found "
            f"{total} under {root}; install Python with its standard library as source, or set "
            "config.data.name='text' and config.data.files"
        )
    by_split: dict[str, list[bytes]] = {split: [] for split in SPLIT_NAMES}
    digest = hashlib.sha256()
    for path, data in files.items():
        by_split[_python_split(path)].append(data)
        digest.update(data)
    logging.info(
        "python_source files=%d bytes=%d sha256=%s", len(files), total, digest.hexdigest()[:16]
    )
    return Splits(
        "python_source",
        {
            split: functools.partial(concatenate, f"python_source/{split}", documents)
            for split, documents in by_split.items()
        },
    )


def _read_python_files(root: pathlib.Path) -> dict[str, bytes]:
    """Returns relative posix path -> content of the UTF-8 `.py` files under `root`, sorted.

    Above `PYTHON_SOURCE_MAX_BYTES` files are dropped in the order of the hash of their path, so
    that no part of the alphabet is lost. The test suite's deliberately broken files are named bad*.
    """
    files: dict[str, bytes] = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for name in names:
            if not name.endswith(".py") or name.startswith("bad"):
                continue
            path = pathlib.Path(folder, name)
            data = path.read_bytes()
            if data and _is_utf8(data):
                files[path.relative_to(root).as_posix()] = data
    kept, total = [], 0
    for path in sorted(files, key=lambda p: _path_hash(p)[8:]):
        total += len(files[path])
        if total > PYTHON_SOURCE_MAX_BYTES:
            break
        kept.append(path)
    return {path: files[path] for path in sorted(kept)}


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _path_hash(path: str) -> bytes:
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()


def _python_split(path: str) -> str:
    """Returns the split of the file at this relative posix path."""
    share = int.from_bytes(_path_hash(path)[:8], "big") % 1000
    return SPLIT_NAMES[sum(share >= bound for bound in PYTHON_SOURCE_BOUNDS)]


def load_text(config_data: DataConfig) -> Splits:
    """Returns the user's files as one stream cut into train | validation | test by bytes.

    Files are sorted by name, each a document or a table of them (`text_files.py`); empty ones are
    left out. Splits with files of their own are not cut from the others.
    """
    shares = {
        "validation_fraction": config_data.validation_fraction,
        "test_fraction": config_data.test_fraction,
    }
    for field, value in shares.items():
        if not 0 <= value < 1:
            raise ValueError(
                f"config.data.{field} must be at least 0 and below 1: got {value}; "
                "set the share of the bytes, e.g. 0.05"
            )
    if sum(shares.values()) >= 1:
        raise ValueError(
            "config.data.validation_fraction + config.data.test_fraction must be below 1, to leave "
            f"bytes for training: got {sum(shares.values())}; lower one of them"
        )
    own = {"validation": config_data.validation_files, "test": config_data.test_files}
    text_field = config_data.text_field or "text"
    parent = open_files("text", config_data.files, field="config.data.files", text_field=text_field)
    n_test, n_validation = (
        0 if own[split] else round(parent.n_bytes * shares[f"{split}_fraction"])
        for split in ("test", "validation")
    )
    bounds = [0, parent.n_bytes - n_validation - n_test, parent.n_bytes - n_test, parent.n_bytes]
    build: dict[str, Callable[[], TextStream]] = {
        split: functools.partial(_text_split, parent, split, bounds[i], bounds[i + 1])
        for i, split in enumerate(SPLIT_NAMES)
    }
    for split, patterns in own.items():
        if patterns:
            field = f"config.data.{split}_files"
            build[split] = functools.partial(
                open_files, f"text/{split}", patterns, field=field, text_field=text_field
            )
    return Splits("text", build)


def _text_split(parent: TextStream, split: str, start: int, stop: int) -> TextStream:
    if start == stop:
        raise ValueError(
            f"the {split} split of config.data.files must have at least one byte: it has none of "
            f"{parent.n_bytes}; change config.data.validation_fraction or "
            "config.data.test_fraction, or give more text"
        )
    return SliceStream(f"text/{split}", parent, start, stop)


def load_recall(config_data: DataConfig) -> Splits:
    """Returns a recall task; its noise is the text of another source, read with the same fields."""

    def load_text(name: str) -> Splits:
        texts = sorted(set(SOURCES) - set(recall.RECALL_NAMES) - {"imagenet64"})
        if name not in texts:
            raise ValueError(
                f"config.data.recall.text must be one of {texts}: got {name!r}; set it to one"
            )
        return SOURCES[name](config_data)

    return recall.load_recall(config_data, load_text)


SOURCES: dict[str, Callable[[DataConfig], Splits]] = {
    "python_source": load_python_source,
    "text": load_text,
    "enwik8": lambda data: enwik8.load_enwik8(data.data_dir, download=data.download),
    "enwik8_4m": lambda data: enwik8.load_enwik8_4m(data.data_dir),
    "text8": lambda data: enwik8.load_text8(data.data_dir),
    "pg19": lambda data: pg19.load_pg19(data.data_dir),
    "pg19_mini": lambda data: pg19.load_pg19_mini(data.data_dir),
    "pg19_tfds": lambda data: tfds_source.load_pg19_tfds(data.data_dir),
    "imagenet64": lambda data: imagenet64.load_imagenet64(data.data_dir),
    **dict.fromkeys(recall.RECALL_NAMES, load_recall),
}
