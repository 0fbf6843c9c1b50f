"""Rows of the recall tasks: facts, scattered over segments, and a question about one at the end.

A row is `n_segments` segments that hold facts and noise, and one that ends with the question and
its answer. A fact lies within one segment; its distance in segments is 1 in the segment before the
question. Everything is drawn from the generator that is passed in. Not here: the tasks that hide
their facts in text (`recall_text_tasks.py`), which row belongs to which split, and batches
(`recall.py`).

Source: Rodkin et al. (2024), arXiv 2407.04841 (associative retrieval, rewriting); Mohtashami and
Jaggi (2023), arXiv 2305.16300 (passkey); Kuratov et al. (2024), arXiv 2406.10149 (facts in text).
"""

import dataclasses
import re
from typing import NamedTuple

import numpy as np

from longctx_jax.data.streams import TextStream

NOISES = ("pad", "random")
PAD = ord(".")
LETTERS = 26


class Answer(NamedTuple):
    """Bytes start .. stop-1 of a row are the answer; distances from the question to its fact."""

    start: int
    stop: int
    distance_segments: int
    distance_bytes: int  # from the first byte of the fact to the first of the question


class Row(NamedTuple):
    """One item of a task."""

    text: np.ndarray  # uint8 [row_len]
    answers: tuple[Answer, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """What the tasks share: the sizes of a row.

    Attributes:
        segment_len: bytes.
        n_segments: before the one with the question, at least 1.
        max_distance: segments, from the question to the fact that answers it.
    """

    segment_len: int
    n_segments: int
    max_distance: int

    @property
    def row_len(self) -> int:
        """Bytes a row."""
        return (self.n_segments + 1) * self.segment_len

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the answers that the task knows."""
        raise NotImplementedError

    def trivial(self, row: Row, answer: Answer) -> float:
        """Returns the accuracy, here, of a guess from the facts without the question.

        Of a task with one fact, which such a guess would have to recall, the chance.
        """
        del row, answer
        return self.chance

    def draw(self, rng: np.random.Generator, text: TextStream | None) -> Row | None:
        """Returns a row; None if its noise happens to hold a fact: draw again."""
        raise NotImplementedError

    def draw_distance(self, rng: np.random.Generator) -> int:
        """Returns the segments from the question to its fact."""
        return int(rng.integers(1, self.max_distance + 1))

    def require_room(self, needed: int, what: str, remedy: str) -> None:
        """Raises ValueError unless a segment holds `needed` bytes."""
        if needed > self.segment_len:
            raise ValueError(
                f"config.data.recall.segment_len must hold {what}, {needed} bytes: got "
                f"{self.segment_len}; raise it, or {remedy}"
            )


@dataclasses.dataclass(frozen=True)
class Associative(Task):
    """Pairs `key=VALUE`; the questions are `key?`, followed by the value.

    Keys are lower-case letters, each once in a row. With `rewrite` they come from `n_keys` keys and
    may come again: the newest value counts.
    """

    n_questions: int
    pairs_per_segment: int
    key_len: int
    value_len: int
    n_symbols: int
    rewrite: bool
    n_keys: int
    noise: str

    def __post_init__(self):
        """Checks that the pairs and the questions fit, and that there are keys enough."""
        for field in ("n_questions", "pairs_per_segment", "key_len", "value_len"):
            require_at_least(field, getattr(self, field), 1)
        if not 2 <= self.n_symbols <= LETTERS:
            raise ValueError(
                f"config.data.recall.n_symbols must lie in 2 .. {LETTERS}: got {self.n_symbols}; "
                "it is the number of letters in use"
            )
        if self.noise not in NOISES:
            raise ValueError(
                f"config.data.recall.noise must be one of {NOISES}: got {self.noise!r}; "
                "set it to one of them"
            )
        pair = self.key_len + 1 + self.value_len
        remedy = "lower key_len or value_len"
        self.require_room(
            self.pairs_per_segment * pair, "pairs_per_segment pairs", f"{remedy}, or their number"
        )
        self.require_room(
            self.n_questions * pair, "n_questions questions", f"{remedy}, or n_questions"
        )
        n_reached = self.max_distance * self.pairs_per_segment
        if self.n_questions > n_reached:
            raise ValueError(
                "config.data.recall.n_questions must be at most the number of pairs to ask for: "
                f"got {self.n_questions}, and {n_reached} pairs within {self.max_distance} "
                "segments; lower it, or raise config.data.seq_len"
            )
        if self.n_drawn_keys > self.n_symbols**self.key_len:
            raise ValueError(
                f"config.data.recall.key_len must allow {self.n_drawn_keys} different keys: got "
                f"{self.key_len}, with n_symbols={self.n_symbols} that is "
                f"{self.n_symbols**self.key_len}; raise one of them, or shorten the row"
            )
        if self.rewrite and self.n_drawn_keys <= self.n_questions:
            raise ValueError(
                "config.data.recall.n_keys must be above n_questions, so that a key can be left "
                f"alone after its last writing: got {self.n_drawn_keys} and {self.n_questions}; "
                "raise it (0 = half the number of pairs)"
            )

    @property
    def n_pairs(self) -> int:
        """Pairs a row."""
        return self.n_segments * self.pairs_per_segment

    @property
    def n_drawn_keys(self) -> int:
        """Different keys a row may hold."""
        if not self.rewrite:
            return self.n_pairs
        return self.n_keys or max(self.n_questions + 1, self.n_pairs // 2)

    @property
    def chance(self) -> float:
        """Accuracy of a random value."""
        return float(self.n_symbols) ** -self.value_len

    def trivial(self, row: Row, answer: Answer) -> float:
        """Returns the share of the row's values that are the answer: a guess among them."""
        values = re.findall(rb"=([A-Z]{%d})" % self.value_len, row.text.tobytes())
        return values.count(row.text[answer.start : answer.stop].tobytes()) / len(values)

    def draw(self, rng: np.random.Generator, text: TextStream | None = None) -> Row:
        """Returns a row; needs no text."""
        del text
        per_segment, n_questions = self.pairs_per_segment, self.n_questions
        size = self.key_len + 1 + self.value_len
        row = np.full(self.row_len, PAD, np.uint8)
        if self.noise == "random":
            row = (ord("0") + rng.integers(0, 10, self.row_len)).astype(np.uint8)
        first = self.n_pairs - self.max_distance * per_segment
        asked = first + rng.choice(self.n_pairs - first, n_questions, replace=False)
        keys = rng.choice(self.n_symbols**self.key_len, self.n_drawn_keys, replace=False)
        if self.rewrite:
            keys = keys[self._rewritten(rng, asked)]
        values = rng.integers(0, self.n_symbols, (self.n_pairs, self.value_len))
        pairs = np.full((self.n_pairs, size), ord("="), np.uint8)
        powers = self.n_symbols ** np.arange(self.key_len)
        pairs[:, : self.key_len] = ord("a") + keys[:, None] // powers % self.n_symbols
        pairs[:, self.key_len + 1 :] = ord("A") + values
        room = self.segment_len - per_segment * size
        within = np.sort(rng.integers(0, room + 1, (self.n_segments, per_segment)), axis=1)
        starts = within + np.arange(per_segment) * size
        starts = (starts + np.arange(self.n_segments)[:, None] * self.segment_len).reshape(-1)
        row[starts[:, None] + np.arange(size)] = pairs
        questions = pairs[asked]
        questions[:, self.key_len] = ord("?")
        row[-questions.size :] = questions.reshape(-1)
        answers = []
        for q, place in enumerate(asked.tolist()):
            start = self.row_len - (n_questions - q) * size
            answers.append(
                Answer(
                    start + self.key_len + 1,
                    start + size,
                    self.n_segments - place // per_segment,
                    start - int(starts[place]),
                )
            )
        return Row(row, tuple(answers))

    def _rewritten(self, rng: np.random.Generator, asked: np.ndarray) -> np.ndarray:
        """Returns the key number of each pair; the asked pairs are the last with their keys.

        Each asked key is also written somewhere before, in a place of its own, where there is one:
        places are given to the earliest first, who has the least to choose from.
        """
        n_keys, last = self.n_drawn_keys, dict(enumerate(asked.tolist()))
        chosen = rng.integers(0, n_keys, self.n_pairs)
        chosen[asked] = np.arange(asked.size)
        taken = asked
        for key in np.argsort(asked).tolist():
            earlier = np.setdiff1d(np.arange(last[key]), taken)
            if earlier.size:
                taken = np.append(taken, rng.choice(earlier))
                chosen[taken[-1]] = key
        for place in range(self.n_pairs):
            key = int(chosen[place])
            if last.get(key, self.n_pairs) < place:
                free = [k for k in range(n_keys) if last.get(k, self.n_pairs) > place]
                chosen[place] = free[rng.integers(len(free))]
        return chosen


def require_at_least(field: str, value: int, least: int) -> None:
    """Raises ValueError unless config.data.recall.<field> >= least."""
    if value < least:
        raise ValueError(
            f"config.data.recall.{field} must be at least {least}: got {value}; raise it"
        )
