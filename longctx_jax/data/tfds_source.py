"""PG-19 as prepared by TensorFlow Datasets: the only file that touches `tensorflow_datasets`.

Reading a data set that was prepared as array_record needs no TensorFlow; preparing this one does,
once, on any machine. Records come back in hashed order, so they are put in order of book id. A
split is loaded into memory whole when first used: 11 GB for the training split.
"""

import functools
import pathlib
from typing import Any

from longctx_jax.data.pg19 import warn_unless_pg19
from longctx_jax.data.splits import SPLIT_NAMES, Splits, resolve_data_dir, where_from
from longctx_jax.data.streams import TextStream, concatenate


def load_pg19_tfds(data_dir: str) -> Splits:
    """Returns PG-19's splits from a prepared TFDS folder, `data_dir/pg19/VERSION`.

    Raises:
        ImportError: if tensorflow_datasets is not installed.
        FileNotFoundError: if the data set is not prepared there, with the command that does it.
        ValueError: if it was prepared in a format without random access.
    """
    root = resolve_data_dir(data_dir)
    builder = _builder(root, where_from(data_dir))
    warn_unless_pg19(
        "pg19_tfds", {split: info.num_examples for split, info in builder.info.splits.items()}
    )
    try:
        records = {split: builder.as_data_source(split=split) for split in SPLIT_NAMES}
    except NotImplementedError as error:
        raise ValueError(
            f"pg19_tfds must be prepared in a format with random access: {builder.data_dir} is "
            f"not ({error}); prepare it again with `{_command(root)}`"
        ) from error
    return Splits(
        "pg19_tfds",
        {split: functools.partial(read_books, split, source) for split, source in records.items()},
    )


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


def _builder(root: pathlib.Path, chosen_by: str) -> Any:
    """Returns a read-only builder of the newest prepared version."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"config.data.name='pg19_tfds' needs tensorflow_datasets, which cannot be imported "
            f"({error}); run `pip install tensorflow-datasets importlib_resources`, or set "
            "config.data.name='pg19'"
        ) from error
    prepared = [path.parent for path in (root / "pg19").glob("*/dataset_info.json")]
    if not prepared:
        raise FileNotFoundError(
            f"pg19_tfds must be prepared as {root / 'pg19'}/VERSION ({chosen_by}): it is not; "
            f"run `{_command(root)}` (preparing needs the package tensorflow, reading does not), "
            "or set config.data.data_dir"
        )
    newest = max(prepared, key=lambda path: [int(n) for n in path.name.split(".") if n.isdigit()])
    return tfds.builder_from_directory(newest)


def _command(root: pathlib.Path) -> str:
    return f"tfds build pg19 --file_format=array_record --data_dir={root}"
