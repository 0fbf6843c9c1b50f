"""Data sets as prepared by TensorFlow Datasets: the only file that touches `tensorflow_datasets`.

Reading a data set that was prepared as array_record needs no TensorFlow; preparing one may, once,
on any machine. Records come back in hashed order, so PG-19's are put in order of book id: a split
of it is loaded into memory whole when first used, 11 GB for the training split.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

from longctx_jax.data.pg19 import warn_unless_pg19
from longctx_jax.data.splits import SPLIT_NAMES, Splits, resolve_data_dir, where_from
from longctx_jax.data.streams import TextStream, concatenate


def load_pg19_tfds(data_dir: str) -> Splits:
    """Returns PG-19's splits from a prepared TFDS folder, `data_dir/pg19/VERSION`.

    Raises:
        As `open_records`.
    """
    records = open_records("pg19_tfds", "pg19", data_dir, SPLIT_NAMES)
    warn_unless_pg19("pg19_tfds", {split: len(found) for split, found in records.items()})
    return Splits(
        "pg19_tfds",
        {split: functools.partial(read_books, split, found) for split, found in records.items()},
    )


def open_records(
    name: str, dataset: str, data_dir: str, splits: Sequence[str]
) -> dict[str, Sequence[dict[str, Any]]]:
    """Returns random access to the decoded records of each split of a prepared data set.

    Args:
        name: value of `config.data.name`, for messages.
        dataset: TFDS's name, prepared in `data_dir/DATASET/VERSION`; the newest version counts.
        data_dir: `config.data.data_dir`.
        splits: TFDS's names.

    Raises:
        ImportError: if tensorflow_datasets is not installed.
        FileNotFoundError: if the data set is not prepared there, with the command that does it.
        ValueError: if it was prepared in a format without random access.
    """
    root = resolve_data_dir(data_dir)
    command = f"tfds build {dataset} --file_format=array_record --data_dir={root}"
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"config.data.name={name!r} needs tensorflow_datasets, which cannot be imported "
            f"({error}); run `pip install tensorflow-datasets importlib_resources`, or set "
            "another config.data.name"
        ) from error
    prepared = [path.parent for path in (root / dataset).glob("*/dataset_info.json")]
    if not prepared:
        raise FileNotFoundError(
            f"{name} must be prepared as {root / dataset}/VERSION ({where_from(data_dir)}): it is "
            f"not; run `{command}` (preparing needs the package tensorflow, reading does not), "
            "or set config.data.data_dir"
        )
    builder: Any = tfds.builder_from_directory(max(prepared, key=_version))
    try:
        return {split: builder.as_data_source(split=split) for split in splits}
    except NotImplementedError as error:
        raise ValueError(
            f"{name} must be prepared in a format with random access: {builder.data_dir} is "
            f"not ({error}); prepare it again with `{command}`"
        ) from error


def _version(path: pathlib.Path) -> list[int]:
    return [int(number) for number in path.name.split(".") if number.isdecimal()]


def read_books(split: str, records: Any) -> TextStream:
    """Returns the books in order of id, each a document.

    Args:
        split: the split's name.
        records: a sequence of dicts with `book_id` and `book_text` (bytes, UTF-8).
    """
    books = [(int(record["book_id"]), record["book_text"]) for record in records]
    books.sort(key=lambda book: book[0])
    texts = [text.encode("utf-8") if isinstance(text, str) else text for _, text in books]
    return concatenate(f"pg19_tfds/{split}", texts)
