"""Rows of the recall tasks that hide sentences in text: a passkey, and people who move."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from longctx_jax.data.recall_tasks import Answer, Row, Task, require_at_least
from longctx_jax.data.streams import TextStream

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


@dataclasses.dataclass(frozen=True)
class Passkey(Task):
    """A number of `n_digits` digits in one sentence, somewhere in text."""

    n_digits: int

    def __post_init__(self):
        """Checks that the sentences fit."""
        require_at_least("n_digits", self.n_digits, 1)
        longest = max(len(PASSKEY_FACT) - 2, len(PASSKEY_QUESTION))
        self.require_room(longest + self.n_digits, "the sentences", "lower n_digits")

    @property
    def chance(self) -> float:
        """Accuracy of a random number."""
        return 10.0**-self.n_digits

    def draw(self, rng: np.random.Generator, text: TextStream | None) -> Row | None:
        """Returns a row of text with the number in it."""
        row = _noise(rng, text, self.row_len)
        number = bytes((ord("0") + rng.integers(0, 10, self.n_digits)).tolist())
        distance = self.draw_distance(rng)
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
        require_at_least("n_facts", self.n_facts, 2 if self.chain else 1)
        n_together = 2 if self.chain else 1
        self.require_room(n_together * FACT_BYTES, f"{n_together} sentences", "turn chain off")
        answer = max(map(len, PLACES)) + 1
        self.require_room(FACTS_QUESTION_BYTES + answer, "the question", "choose another task")
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
        distance = self.draw_distance(rng)
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
