"""PG-19 in its published folder layout, `train|validation|test/ID.txt`, one book a file.

Rae et al. (2020): 28,602/50/100 books published before 1919. `pg19_mini` is a handful of books in
the same layout, checked against its table of digests; its numbers are not PG-19 numbers. Books are
documents, ordered by their integer id.
"""

import csv
import functools
import hashlib
import io
import pathlib

from absl import logging

from longctx_jax import json_files
from longctx_jax.data.splits import SPLIT_NAMES, Splits, resolve_data_dir, where_from
from longctx_jax.data.streams import FileStream, TextStream

TABLE_MAX_BYTES = 16_000_000  # of a metadata.csv
PG19_BOOKS = {"train": 28_602, "validation": 50, "test": 100}


def load_pg19(data_dir: str) -> Splits:
    """Returns the books under the data folder or its `pg19/`; warns if they are not all of PG-19.

    Raises:
        FileNotFoundError: if a split's folder is missing or has no books.
        ValueError: if a file is not named after an integer id, is empty or not UTF-8.
    """
    _, books = _find_books("pg19", data_dir)
    counts = {split: len(paths) for split, paths in books.items()}
    warn_unless_pg19("pg19", counts)
    return Splits(
        "pg19",
        {
            split: functools.partial(FileStream, f"pg19/{split}", paths, check_utf8=True)
            for split, paths in books.items()
        },
    )


def load_pg19_mini(data_dir: str) -> Splits:
    """Returns the books under `pg19_mini/` or the data folder itself, checked when first used.

    Each split is compared with `metadata.csv` (columns split, book_id, bytes, sha256), if present.

    Raises:
        FileNotFoundError: if a split's folder is missing or has no books.
        ValueError: if the books are not those of the table.
    """
    root, books = _find_books("pg19_mini", data_dir)
    return Splits(
        "pg19_mini",
        {
            split: functools.partial(_open_mini, split, paths, root / "metadata.csv")
            for split, paths in books.items()
        },
    )


def warn_unless_pg19(name: str, counts: dict[str, int]) -> None:
    """Logs a warning if the numbers of books differ from PG-19's."""
    if counts != PG19_BOOKS:
        logging.warning(
            "numbers on this data are not PG-19 results: source=%s books=%s expected=%s",
            name,
            counts,
            PG19_BOOKS,
        )


def _find_books(name: str, data_dir: str) -> tuple[pathlib.Path, dict[str, list[pathlib.Path]]]:
    """Returns the data set's folder and the files of each split, ordered by id."""
    base = resolve_data_dir(data_dir)
    candidates = (base / name, base)
    root = next((c for c in candidates if any((c / s).is_dir() for s in SPLIT_NAMES)), None)
    if root is None:
        raise FileNotFoundError(
            f"{name} must be folders train, validation and test of ID.txt files in {base / name} "
            f"or {base} ({where_from(data_dir)}): there are none; put them there, or set "
            "config.data.data_dir to the folder that has them"
        )
    return root, {split: _list_books(name, root / split) for split in SPLIT_NAMES}


def _list_books(name: str, folder: pathlib.Path) -> list[pathlib.Path]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name} must have the folders train, validation and test: {folder} is missing; fetch "
            "that split, or set config.data.data_dir to a complete copy"
        )
    paths = [path for path in folder.iterdir() if path.suffix == ".txt" and path.name[0] != "."]
    if not paths:
        raise FileNotFoundError(
            f"each split of {name} must have at least one book ID.txt: {folder} has none; fetch "
            "that split again"
        )
    for path in paths:
        if not (path.stem.isascii() and path.stem.isdigit()):
            raise ValueError(
                f"each book of {name} must be named after its integer id, as 1342.txt: got {path}; "
                "rename or remove it"
            )
    return sorted(paths, key=lambda path: int(path.stem))


def _open_mini(split: str, paths: list[pathlib.Path], table: pathlib.Path) -> TextStream:
    if table.is_file():
        _require_listed(split, paths, table)
    return FileStream(f"pg19_mini/{split}", paths, check_utf8=True)


def _require_listed(split: str, paths: list[pathlib.Path], table: pathlib.Path) -> None:
    """Raises ValueError unless the books of a split are those of the table, byte for byte."""
    rows = _read_table(table, split)
    found = {int(path.stem): path for path in paths}
    if found.keys() != rows.keys():
        raise ValueError(
            f"the books of pg19_mini/{split} must be those of {table}: missing ids "
            f"{sorted(rows.keys() - found.keys())}, unlisted ids "
            f"{sorted(found.keys() - rows.keys())}; copy the data set again"
        )
    for book_id, path in found.items():
        n_bytes, sha256 = rows[book_id]
        size = path.stat().st_size
        if size != n_bytes:
            raise ValueError(
                f"{path} must have {n_bytes} bytes by {table.name}: it has {size}; "
                "copy the file again"
            )
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != sha256:
            raise ValueError(
                f"{path} must have sha256 {sha256} by {table.name}: it has {digest}; "
                "copy the file again"
            )


def _read_table(table: pathlib.Path, split: str) -> dict[int, tuple[int, str]]:
    """Returns bytes and sha256 of each book of a split, by id."""
    remedy = "copy the data set again"
    raw = json_files.read_limited(table, TABLE_MAX_BYTES, remedy=remedy)
    rows: dict[int, tuple[int, str]] = {}
    try:
        for row in csv.DictReader(io.StringIO(raw.decode("utf-8"), newline="")):
            if row["split"] == split:
                rows[int(row["book_id"])] = int(row["bytes"]), row["sha256"]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{table} must have the columns split, book_id, bytes and sha256: it cannot be read "
            f"({error!r:.200}); {remedy}"
        ) from error
    return rows
