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

    How many others move after the move that is the answer is uniform, as far as there is room, so
    that the order of the moves alone says little about which of them it is.

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
        """Sentences that a segment surely holds; no more than there are."""
        return min(self.segment_len // FACT_BYTES, self.n_facts)

    @property
    def chance(self) -> float:
        """Accuracy of a random place."""
        return 1 / len(PLACES)

    def trivial(self, row: Row, answer: Answer) -> float:
        """Returns 1 if the answer is where somebody moved last, else 0."""
        places = [place for _, _, place, _ in FACT.findall(row.text.tobytes()) if place]
        return float(places[-1] == row.text[answer.start : answer.stop - 1].tobytes())

    def draw(self, rng: np.random.Generator, text: TextStream | None) -> Row | None:
        """Returns a row of text with the sentences in it."""
        row = _noise(rng, text, self.row_len)
        person, thing, place = (_one(rng, words) for words in (PEOPLE, OBJECTS, PLACES))
        distance = self.draw_distance(rng)
        distances = [distance]
        if self.chain:
            distances = _shuffled(rng, [distance, int(rng.integers(1, distance + 1))])
        segments = [self.n_segments - d for d in distances]
        n_others = self.n_facts - len(segments)
        n_takes = int(rng.binomial(n_others - 1, 0.5)) if self.chain and n_others else 0
        n_takes = min(n_takes, len(OBJECTS) - 1)
        slots, before, after, takes = self._scatter(rng, segments, n_others - n_takes, n_takes)
        answers = [MOVE % (person, _one(rng, MOVES), place), TAKE % (person, thing)]
        facts = dict(zip(slots, answers, strict=False))
        others = [p for p in PEOPLE if p != person]
        for slot in before + after:
            people = PEOPLE if slot in before else others
            facts[slot] = MOVE % (_one(rng, people), _one(rng, MOVES), _one(rng, PLACES))
        objects = _shuffled(rng, [o for o in OBJECTS if o != thing])
        for slot in takes:
            facts[slot] = TAKE % (_one(rng, PEOPLE), objects.pop())
        starts = {}
        for segment in sorted({slot // self.facts_per_segment for slot in facts}):
            here = [slot for slot in sorted(facts) if slot // self.facts_per_segment == segment]
            sentences = [facts[slot] for slot in here]
            written = _write(rng, row, segment, self.segment_len, sentences)
            starts |= zip(here, written, strict=True)
        asked = b"the " + thing if self.chain else person
        question = _ask(row, FACTS_QUESTION % asked, place + b".")
        if len(FACT.findall(row.tobytes())) != self.n_facts:
            return None
        stop = row.size
        farthest = question - min(starts[slot] for slot in slots)
        return Row(row, (Answer(stop - len(place) - 1, stop, distance, farthest),))

    def _scatter(
        self, rng: np.random.Generator, segments: list[int], n_moves: int, n_takes: int
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Returns where facts go, in slots of which each segment has `facts_per_segment`.

        Args:
            rng: what decides.
            segments: of the facts that make the answer; the first is a move.
            n_moves: others, some before it and some after it.
            n_takes: of other objects, anywhere.

        Returns:
            The slots of the facts that make the answer, of the moves before the first of them, of
            those after it, and of the takes.
        """
        n_here, n_slots = self.facts_per_segment, self.n_segments * self.facts_per_segment
        grid = np.meshgrid(*(segment * n_here + np.arange(n_here) for segment in segments))
        slots = np.stack([axis.reshape(-1) for axis in grid])  # every way to place them
        move, others = slots[0], slots[1:]
        n_after = int(rng.integers(n_moves + 1))
        room_before = move - np.sum(others < move, axis=0)
        room_after = n_slots - 1 - move - np.sum(others > move, axis=0)
        lacking = np.maximum(n_after - room_after, 0)
        lacking += np.maximum(n_moves - n_after - room_before, 0)
        lacking[np.any(others == move, axis=0)] = n_slots
        pick = rng.choice(np.flatnonzero(lacking == np.min(lacking)))
        n_after = int(np.clip(n_after, n_moves - room_before[pick], room_after[pick]))
        free = np.setdiff1d(np.arange(n_slots), slots[:, pick])
        before = rng.choice(free[free < move[pick]], n_moves - n_after, replace=False)
        after = rng.choice(free[free > move[pick]], n_after, replace=False)
        free = np.setdiff1d(free, np.concatenate([before, after]))
        takes = rng.choice(free, n_takes, replace=False)
        return slots[:, pick].tolist(), before.tolist(), after.tolist(), takes.tolist()


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
