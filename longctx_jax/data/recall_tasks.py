"""Rows of the recall tasks: facts, scattered over segments, and a question about one at the end.

A row is `n_segments` segments that hold facts and noise, and one that ends with the question and
its answer. A fact lies within one segment; its distance in segments is 1 in the segment before the
question. Everything is drawn from the generator that is passed in. Not here: which row belongs to
which split, and batches (`recall.py`).

Source: Rodkin et al. (2024), arXiv 2407.04841 (associative retrieval, rewriting); Mohtashami and
Jaggi (2023), arXiv 2305.16300 (passkey); Kuratov et al. (2024), arXiv 2406.10149 (facts in text).
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from longctx_jax.data.streams import TextStream

NOISES = ("pad", "random")
PAD = ord(".")
LETTERS = 26

PASSKEY_FACT = b" The pass key is %s. Remember it. "
PASSKEY_QUESTION = b" What is the pass key? The pass key is "

PEOPLE = (b"Mary", b"John", b"Sandra", b"Daniel")
PLACES = (b"kitchen", b"garden", b"office", b"bathroom", b"bedroom", b"hallway")
OBJECTS = (b"apple", b"football", b"milk", b"lamp")
MOVES = (b"went", b"moved", b"travelled", b"walked")
MOVE = b" %s %s to the %s. "
TAKE = b" %s took the %s. "
FACT_BYTES = max(
    len(MOVE % (max(PEOPLE, key=len), max(MOVES, key=len), max(PLACES, key=len))),
    len(TAKE % (max(PEOPLE, key=len), max(OBJECTS, key=len))),
)
FACTS_QUESTION = b" Where is %s? "
FACTS_QUESTION_BYTES = max(len(FACTS_QUESTION % b"the football"), len(FACTS_QUESTION % b"Sandra"))
FACT = re.compile(
    rb"\b(%s) (?:(%s) to the (%s)|took the (%s))\."
    % tuple(b"|".join(words) for words in (PEOPLE, MOVES, PLACES, OBJECTS))
)


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

    def draw(self, rng: np.random.Generator, text: TextStream | None) -> Row | None:
        """Returns a row; None if its noise happens to hold a fact: draw again."""
        raise NotImplementedError

    def _draw_distance(self, rng: np.random.Generator) -> int:
        return int(rng.integers(1, self.max_distance + 1))

    def _require_room(self, needed: int, what: str, remedy: str) -> None:
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
            _require_at_least(field, getattr(self, field), 1)
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
        self._require_room(
            self.pairs_per_segment * pair, "pairs_per_segment pairs", f"{remedy}, or their number"
        )
        self._require_room(
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

        Each asked key is also written somewhere before, where there is a place for it.
        """
        n_keys, last = self.n_drawn_keys, dict(enumerate(asked.tolist()))
        chosen = rng.integers(0, n_keys, self.n_pairs)
        for key, place in last.items():
            earlier = np.setdiff1d(np.arange(place), asked)
            if earlier.size:
                chosen[rng.choice(earlier)] = key
            chosen[place] = key
        for place in range(self.n_pairs):
            key = int(chosen[place])
            if last.get(key, self.n_pairs) < place:
                free = [k for k in range(n_keys) if last.get(k, self.n_pairs) > place]
                chosen[place] = free[rng.integers(len(free))]
        return chosen


@dataclasses.dataclass(frozen=True)
class Passkey(Task):
    """A number of `n_digits` digits in one sentence, somewhere in text."""

    n_digits: int

    def __post_init__(self):
        """Checks that the sentences fit."""
        _require_at_least("n_digits", self.n_digits, 1)
        longest = max(len(PASSKEY_FACT) - 2, len(PASSKEY_QUESTION))
        self._require_room(longest + self.n_digits, "the sentences", "lower n_digits")

    @property
    def chance(self) -> float:
        """Accuracy of a random number."""
        return 10.0**-self.n_digits

    def draw(self, rng: np.random.Generator, text: TextStream | None) -> Row | None:
        """Returns a row of text with the number in it."""
        row = _noise(rng, text, self.row_len)
        number = bytes((ord("0") + rng.integers(0, 10, self.n_digits)).tolist())
        distance = self._draw_distance(rng)
        segment = self.n_segments - distance
        (start,) = _write(rng, row, segment, self.segment_len, [PASSKEY_FACT % number])
        question = _ask(row, PASSKEY_QUESTION, number)
        if row.tobytes().count(b"pass key") != 3:
            return None
        answer = Answer(row.size - self.n_digits, row.size, distance, question - start)
        return Row(row, (answer,))


@dataclasses.dataclass(frozen=True)
class Facts(Task):
    """People move between places, in sentences scattered over text; the last place counts.

    chain: somebody takes an object and moves (in either order), and the question is where the
    object is; the distance is that of the farther of the two sentences.
    """

    n_facts: int
    chain: bool

    def __post_init__(self):
        """Checks that the sentences fit."""
        _require_at_least("n_facts", self.n_facts, 2 if self.chain else 1)
        n_together = 2 if self.chain else 1
        self._require_room(n_together * FACT_BYTES, f"{n_together} sentences", "turn chain off")
        answer = max(map(len, PLACES)) + 1
        self._require_room(FACTS_QUESTION_BYTES + answer, "the question", "choose another task")
        if self.n_facts > self.n_segments * self.facts_per_segment:
            raise ValueError(
                "config.data.recall.n_facts must fit in the row: got "
                f"{self.n_facts} for {self.n_segments} segments of at most "
                f"{self.facts_per_segment}; lower it, or raise config.data.seq_len"
            )

    @property
    def facts_per_segment(self) -> int:
        """Sentences that a segment surely holds."""
        return self.segment_len // FACT_BYTES

    @property
    def chance(self) -> float:
        """Accuracy of a random place."""
        return 1 / len(PLACES)

    def draw(self, rng: np.random.Generator, text: TextStream | None) -> Row | None:
        """Returns a row of text with the sentences in it."""
        row = _noise(rng, text, self.row_len)
        person, thing, place = (_one(rng, words) for words in (PEOPLE, OBJECTS, PLACES))
        distance = self._draw_distance(rng)
        distances = [distance]
        if self.chain:
            distances = _shuffled(rng, [distance, int(rng.integers(1, distance + 1))])
        moved_in = self.n_segments - distances[0]
        facts = [(moved_in, MOVE % (person, _one(rng, MOVES), place))]
        if self.chain:
            facts.append((self.n_segments - distances[1], TAKE % (person, thing)))
        n_needed = len(facts)
        facts += self._others(rng, [segment for segment, _ in facts], moved_in, person, thing)
        starts = np.zeros(len(facts), np.int64)
        for segment in sorted({segment for segment, _ in facts}):
            here = _shuffled(rng, [i for i, fact in enumerate(facts) if fact[0] == segment])
            sentences = [facts[i][1] for i in here]
            starts[here] = _write(rng, row, segment, self.segment_len, sentences)
        asked = b"the " + thing if self.chain else person
        question = _ask(row, FACTS_QUESTION % asked, place + b".")
        if len(FACT.findall(row.tobytes())) != self.n_facts:
            return None
        stop = row.size
        farthest = question - int(np.min(starts[:n_needed]))
        return Row(row, (Answer(stop - len(place) - 1, stop, distance, farthest),))

    def _others(
        self,
        rng: np.random.Generator,
        taken: list[int],
        moved_in: int,
        person: bytes,
        thing: bytes,
    ) -> list[tuple[int, bytes]]:
        """Returns (segment, sentence) of facts that do not change the answer.

        The person moves only in segments before `moved_in`; each object is taken once.
        """
        room = np.full(self.n_segments, self.facts_per_segment)
        np.subtract.at(room, taken, 1)
        objects = _shuffled(rng, [o for o in OBJECTS if o != thing])
        facts = []
        for _ in range(self.n_facts - len(taken)):
            segment = int(rng.choice(np.flatnonzero(room)))
            room[segment] -= 1
            if self.chain and objects and rng.integers(2):
                facts.append((segment, TAKE % (_one(rng, PEOPLE), objects.pop())))
                continue
            people = PEOPLE if segment < moved_in else [p for p in PEOPLE if p != person]
            words = (_one(rng, people), _one(rng, MOVES), _one(rng, PLACES))
            facts.append((segment, MOVE % words))
        return facts


def _require_at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(
            f"config.data.recall.{field} must be at least {least}: got {value}; raise it"
        )


def _one(rng: np.random.Generator, words: Sequence[bytes]) -> bytes:
    return words[int(rng.integers(len(words)))]


def _shuffled(rng: np.random.Generator, items: list[Any]) -> list[Any]:
    return [items[i] for i in rng.permutation(len(items))]


def _noise(rng: np.random.Generator, text: TextStream | None, row_len: int) -> np.ndarray:
    """Returns row_len bytes from somewhere in the text."""
    assert text is not None, "a task with text gets one"
    if text.n_bytes < row_len:
        raise ValueError(
            f"{text.name} must have at least data.seq_len bytes to hide facts in: it has "
            f"{text.n_bytes}, and seq_len={row_len}; give more text in config.data.recall.text"
        )
    start = int(rng.integers(text.n_bytes - row_len + 1))
    return np.array(text.read(start, start + row_len))


def _write(
    rng: np.random.Generator,
    row: np.ndarray,
    segment: int,
    segment_len: int,
    sentences: Sequence[bytes],
) -> list[int]:
    """Writes the sentences over a segment, in order, with gaps; returns where each starts."""
    room = segment_len - sum(map(len, sentences))
    gaps = np.sort(rng.integers(0, room + 1, len(sentences)))
    starts, used = [], segment * segment_len
    for gap, sentence in zip(gaps.tolist(), sentences, strict=True):
        start = used + gap
        row[start : start + len(sentence)] = np.frombuffer(sentence, np.uint8)
        starts.append(start + 1)  # sentences begin with a space
        used += len(sentence)
    return starts


def _ask(row: np.ndarray, question: bytes, answer: bytes) -> int:
    """Writes question and answer over the row's end; returns where the question starts."""
    end = question + answer
    row[-len(end) :] = np.frombuffer(end, np.uint8)
    return row.size - len(end) + 1
