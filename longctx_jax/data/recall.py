"""Recall tasks as data sets: rows that are made when asked for, a function of (seed, split, index).

A row is `config.data.seq_len` bytes and stands alone: nothing is carried from one to the next, and
only answers count in the loss. Which rows a split may have is decided by a hash of their bytes (one
half train, a quarter each validate and test), so no two splits share one, whatever the seeds.
Training rows never end. Not here: what is in a row (`recall_tasks.py`, `recall_text_tasks.py`),
accuracy (`evaluation/recall.py`).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from longctx_jax.data.byte_tokens import ByteTokenStream
from longctx_jax.data.recall_tasks import Associative, Row, Task
from longctx_jax.data.recall_text_tasks import Facts, Passkey
from longctx_jax.data.splits import SPLIT_NAMES, Splits
from longctx_jax.data.streams import TextStream
from longctx_jax.data.tokens import Tokenizer, check_ids

RECALL_NAMES = ("recall_associative", "recall_passkey", "recall_facts")
N_TRAIN_ROWS = 2**40  # "for ever"
MAX_ATTEMPTS = 1_000
SPLIT_OF_HASH = ("train", "train", "validation", "test")


class RecallConfig(Protocol):
    """The fields of `config.data` that a recall task reads."""

    name: str
    seq_len: int
    recall: Any


class RowStream(TextStream):
    """The rows of one split, one after another.

    `document_starts` is [0] only, since 2^40 starts would not fit: rows are told apart by
    `sample_bytes` and `document_index`.

    Attributes:
        task: what makes the rows.
        split: "train", "validation" or "test".
        n_rows: in this stream; `row` gives more.
    """

    def __init__(self, task: Task, name: str, split: str, n_rows: int, text: TextStream | None):
        """Makes no row yet; `text` is what facts are hidden in, None for tasks without."""
        super().__init__(f"{name}/{split}", n_rows * task.row_len, np.zeros(1, np.int64))
        self.sample_bytes = task.row_len
        self.task, self.split, self.n_rows = task, split, n_rows
        self._text = text

    def row(self, index: int, seed: int = 0) -> Row:
        """Returns row `index` >= 0 of this split; held-out rows are read with seed 0."""
        for attempt in range(MAX_ATTEMPTS):
            key = [seed, SPLIT_NAMES.index(self.split), index, attempt]
            row = self.task.draw(np.random.default_rng(key), self._text)
            if row is not None and split_of(row.text) == self.split:
                return row
        raise ValueError(
            f"{self.name} must have rows of its own: none of {MAX_ATTEMPTS} that were drawn is; "
            "make the task larger, e.g. raise config.data.recall.key_len or n_symbols"
        )

    def document_index(self, positions: np.ndarray | int) -> np.ndarray:
        """Returns the row each byte position belongs to, int64."""
        return np.asarray(positions, np.int64) // self.sample_bytes

    def _read(self, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return np.zeros(0, np.uint8)
        first, last = start // self.sample_bytes, -(-stop // self.sample_bytes)
        text = np.concatenate([self.row(index).text for index in range(first, last)])
        return text[start - first * self.sample_bytes : stop - first * self.sample_bytes]


class RowTokenStream(ByteTokenStream):
    """The tokens of a `RowStream`, which are its bytes; see `TokenStream`."""

    def __init__(self, stream: RowStream, tokenizer: Tokenizer):
        """Wraps `stream`; raises ValueError unless tokens are plain bytes."""
        if tokenizer.name != "bytes":
            raise ValueError(
                f"config.data.tokenizer must be 'bytes' for {stream.name}: got "
                f"{tokenizer.name!r}; set it"
            )
        super().__init__(stream, tokenizer)
        self.sample_len = stream.sample_bytes
        self.n_documents = stream.n_rows
        self.rows = stream

    def tokens_within(self, n_bytes: int) -> int:
        """Returns the tokens of the whole rows within the first `n_bytes`; one row at least."""
        n_rows = max(1, min(n_bytes // self.sample_len, self.n_documents))
        return n_rows * self.sample_len


@dataclasses.dataclass(frozen=True)
class RowBatches:
    """Held-out rows, in batches to be evaluated by `evaluation.recall`.

    Attributes:
        rows: the stream.
        n_rows: how many of its rows, from the first on.
        batch_size: rows at a time.
        window_len: tokens a call.
    """

    rows: RowStream
    n_rows: int
    batch_size: int
    window_len: int

    def __iter__(self) -> Iterator[list[Row]]:
        """Iterates over batches of rows; the last one may be smaller."""
        for first in range(0, self.n_rows, self.batch_size):
            stop = min(first + self.batch_size, self.n_rows)
            yield [self.rows.row(index) for index in range(first, stop)]


def split_of(text: np.ndarray) -> str:
    """Returns the split that a row of these bytes, uint8 [row_len], may belong to."""
    digest = hashlib.blake2b(text.tobytes(), digest_size=8).digest()
    return SPLIT_OF_HASH[digest[0] % len(SPLIT_OF_HASH)]


def training_row(rows: RowStream, seed: int, vocab_size: int, index: int) -> dict[str, np.ndarray]:
    """Returns row `index` of a run's training data: tokens, targets and weights, all [row_len].

    The last input is the end of the last answer; its target is a padding of weight 0.
    """
    row = rows.row(index, seed)
    tokens = row.text.astype(np.int32)
    check_ids(tokens, vocab_size, rows.name)
    return {
        "tokens": tokens,
        "targets": targets_of(tokens),
        "weights": weights_of(row),
        "model_weights": np.ones(tokens.size, np.float32),  # every token is one, asked or not
    }


def targets_of(tokens: np.ndarray) -> np.ndarray:
    """Returns the tokens after each of `tokens`, and a 0 at the end, along the last axis."""
    targets = np.zeros_like(tokens)
    targets[..., :-1] = tokens[..., 1:]
    return targets


def weights_of(row: Row) -> np.ndarray:
    """Returns 1 where the target is a byte of an answer, else 0, float32 [row_len]."""
    weights = np.zeros(row.text.size, np.float32)
    for answer in row.answers:
        weights[answer.start - 1 : answer.stop - 1] = 1
    return weights


def build_task(config_data: RecallConfig) -> Task:
    """Returns the task that `config.data` describes.

    Raises:
        ValueError: for fields that contradict each other; names them.
    """
    name, fields, seq_len = config_data.name, config_data.recall, config_data.seq_len
    segment_len = fields.segment_len
    if segment_len < 1:
        raise ValueError(
            f"config.data.recall.segment_len must be at least 1: got {segment_len}; raise it"
        )
    n_segments, rest = divmod(seq_len, segment_len)
    if rest or n_segments < 2:
        raise ValueError(
            "config.data.seq_len must be two or more whole segments of "
            f"config.data.recall.segment_len={segment_len}, the last one for the question: got "
            f"{seq_len}; set it to e.g. {max(2, n_segments) * segment_len}"
        )
    n_segments -= 1
    limit = fields.max_distance_segments
    if limit < 0:
        raise ValueError(
            f"config.data.recall.max_distance_segments must not be negative: got {limit}; 0 is "
            "the whole row"
        )
    sizes = {
        "segment_len": segment_len,
        "n_segments": n_segments,
        "max_distance": min(limit, n_segments) if limit else n_segments,
    }
    if name == "recall_associative":
        own = ("n_questions", "pairs_per_segment", "key_len", "value_len")
        own += ("n_symbols", "rewrite", "n_keys", "noise")
        return Associative(**sizes, **{field: fields[field] for field in own})
    if name == "recall_passkey":
        return Passkey(**sizes, n_digits=fields.n_digits)
    return Facts(**sizes, n_facts=fields.n_facts, chain=fields.chain)


def load_recall(config_data: RecallConfig, load_text: Callable[[str], Splits]) -> Splits:
    """Returns the splits of the recall task `config_data.name`.

    Args:
        config_data: `config.data`.
        load_text: name -> the data set whose text facts are hidden in; each split of the task takes
            its noise from the same split of the text.
    """
    task = build_task(config_data)
    n_rows = config_data.recall.n_rows
    if n_rows < 1:
        raise ValueError(f"config.data.recall.n_rows must be at least 1: got {n_rows}; raise it")
    texts = None if isinstance(task, Associative) else load_text(config_data.recall.text)

    def build(split: str) -> RowStream:
        text = None if texts is None else texts[split]
        n = N_TRAIN_ROWS if split == "train" else n_rows
        return RowStream(task, config_data.name, split, n, text)

    return Splits(config_data.name, {s: functools.partial(build, s) for s in SPLIT_NAMES})
