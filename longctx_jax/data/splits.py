"""The three splits of a data set, and where data sets lie on disk."""

import os
import pathlib
from collections.abc import Callable, Iterator, Mapping

from longctx_jax.data.streams import TextStream

SPLIT_NAMES = ("train", "validation", "test")
DATA_DIR_VARIABLE = "LONGCTX_DATA_DIR"


class Splits:
    """Streams by split name, each built when first asked for: `splits["train"]`.

    Attributes:
        name: the data set's name.
    """

    def __init__(self, name: str, build: Mapping[str, Callable[[], TextStream]]):
        """Keeps `build`, a function a split, and calls each at most once."""
        self.name = name
        self._build = dict(build)
        self._streams: dict[str, TextStream] = {}

    def __getitem__(self, split: str) -> TextStream:
        """Returns the stream of `split`; raises ValueError for a name that is not a split."""
        if split not in self._build:
            raise ValueError(
                f"a split of config.data.name={self.name!r} must be one of {list(self._build)}: "
                f"got {split!r}; change config.eval.split or --split"
            )
        if split not in self._streams:
            self._streams[split] = self._build[split]()
        return self._streams[split]

    def __contains__(self, split: object) -> bool:
        """Returns whether `split` names one."""
        return split in self._build

    def __iter__(self) -> Iterator[str]:
        """Iterates over the split names."""
        return iter(self._build)

    def __len__(self) -> int:
        """Returns the number of splits."""
        return len(self._build)


def resolve_data_dir(data_dir: str) -> pathlib.Path:
    """Returns the data folder: the setting, else $LONGCTX_DATA_DIR, else ~/data.

    Args:
        data_dir: `config.data.data_dir`; "" means not set.
    """
    return pathlib.Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or "~/data").expanduser()


def where_from(data_dir: str) -> str:
    """Returns words for a message: which setting `resolve_data_dir` followed."""
    if data_dir:
        return "config.data.data_dir"
    if os.environ.get(DATA_DIR_VARIABLE):
        return f"${DATA_DIR_VARIABLE}, as config.data.data_dir is empty"
    return f"the default, as config.data.data_dir and ${DATA_DIR_VARIABLE} are empty"
