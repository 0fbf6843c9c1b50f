"""Accuracy of recall tasks: how often the answer is right, by its distance from the question.

An answer counts when each of its bytes has the largest logit given the bytes before it, the right
ones: teacher forcing. That is deterministic, and greedy decoding gets an answer right exactly when
this does. Rows are read in windows, with a cache between them that each row starts empty, so a
model of constant memory reads rows of any length in constant memory.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.data import RowBatches
from longctx_jax.data.recall import targets_of, weights_of
from longctx_jax.data.recall_tasks import Answer, Row, Task
from longctx_jax.models.decoder import Decoder, ModelCache
from longctx_jax.nn.partition import everywhere
from longctx_jax.ops.losses import bits_per_byte, token_nll
from longctx_jax.typing import PyTree

Place = Callable[[Any], Any]  # arrays with leading rows, or a cache -> the same on devices
Z_95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval


class Scored(NamedTuple):
    """A question, whether the answer was right, and how often a trivial guess is."""

    answer: Answer
    is_right: bool
    trivial: float


@functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
def window_step(
    model: Decoder,
    variables: dict[str, PyTree],
    tokens: jax.Array,
    targets: jax.Array,
    cache: ModelCache | None,
) -> tuple[jax.Array, jax.Array, ModelCache | None]:
    """Returns predicted ids and losses (nats), each [rows, seq], and the next cache."""
    out = model.apply(variables, tokens, cache)
    predicted = jnp.argmax(out.logits, axis=-1).astype(jnp.int32)
    return everywhere(predicted), everywhere(token_nll(out.logits, targets)), out.cache


def read_rows(
    model: Decoder,
    variables: dict[str, PyTree],
    rows: Sequence[Row],
    *,
    batch_size: int,
    window_len: int,
    cache_len: int,
    place: Place = lambda tree: tree,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns predicted ids int32 and losses (nats) float32, each [rows, row_len].

    Rows are filled up to whole windows behind their end, where nothing can see it, and to
    batch_size, so that each window has one shape.
    """
    texts = np.stack([row.text for row in rows]).astype(np.int32)
    n_rows, row_len = texts.shape
    n_windows = -(-row_len // window_len)
    tokens = np.zeros((batch_size, n_windows * window_len), np.int32)
    tokens[:n_rows, :row_len] = texts
    targets = targets_of(tokens)
    cache = place(model.init_cache(batch_size, cache_len)) if n_windows > 1 else None
    found = []
    for start in range(0, tokens.shape[1], window_len):
        window = slice(start, start + window_len)
        here = place({"tokens": tokens[:, window], "targets": targets[:, window]})
        *result, cache = window_step(model, variables, here["tokens"], here["targets"], cache)
        found.append(result)
    predicted, nll = (np.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return predicted[:n_rows, :row_len], nll[:n_rows, :row_len]


def score_answers(predicted: np.ndarray, rows: Sequence[Row], task: Task) -> list[Scored]:
    """Returns a question's score for each answer of the rows.

    Args:
        predicted: [rows, row_len], the id predicted after each byte.
        rows: of the same length.
        task: what made them.
    """
    scored = []
    for ids, row in zip(predicted, rows, strict=True):
        for answer in row.answers:
            wanted = row.text[answer.start : answer.stop]
            given = ids[answer.start - 1 : answer.stop - 1]
            is_right = bool(np.array_equal(given, wanted))
            scored.append(Scored(answer, is_right, task.trivial(row, answer)))
    return scored


def evaluate_rows(
    model: Decoder,
    variables: dict[str, PyTree],
    batches: RowBatches,
    *,
    cache_len: int = 0,
    progress: Callable[[int, float], None] | None = None,
    place: Place = lambda tree: tree,
) -> tuple[dict[str, float], list[Scored]]:
    """Returns mean losses and accuracy over held-out rows, and the score of each question.

    Args:
        cache_len: tokens that full attention looks back on; 0 = a whole row.
        progress: called after each batch of rows with bytes read and seconds.
        place: puts windows and caches on the devices of a mesh.

    Returns:
        bits_per_byte, nats_per_token, perplexity_per_token, tokens, bytes (all of answers alone),
        accuracy; and the scores.

    Raises:
        ValueError: if the loss is not finite, or windows would cut the model's segments.
    """
    row_len = batches.rows.task.row_len
    window_len = min(batches.window_len, row_len)
    segment_len = model.config.memory.segment_len
    if model.config.recurrence != "none" and window_len < row_len and window_len % segment_len:
        raise ValueError(
            "rows must be read in whole segments of config.model.memory.segment_len="
            f"{segment_len}: got windows of {window_len} bytes; set config.eval.seq_len (or "
            "--window_len) to a multiple"
        )
    sizes = {"batch_size": min(batches.batch_size, batches.n_rows), "window_len": window_len}
    scored: list[Scored] = []
    n_tokens, n_bytes_read, nats, start = 0, 0, 0.0, time.monotonic()
    for rows in batches:
        options = {**sizes, "cache_len": cache_len or row_len, "place": place}
        predicted, nll = read_rows(model, variables, rows, **options)
        scored += score_answers(predicted, rows, batches.rows.task)
        weights = np.stack([weights_of(row) for row in rows])
        n_tokens += int(np.sum(weights))
        nats += float(np.sum(np.asarray(nll, np.float64), where=weights > 0))
        n_bytes_read += len(rows) * row_len
        if progress is not None:
            progress(n_bytes_read, time.monotonic() - start)
    if not math.isfinite(nats):
        raise ValueError(
            f"the loss of this model must be finite: got {nats} nats over {n_tokens} tokens; "
            "evaluate an earlier checkpoint"
        )
    losses = {
        "bits_per_byte": bits_per_byte(nats, n_tokens),
        "nats_per_token": nats / n_tokens,
        "perplexity_per_token": math.exp(min(700.0, nats / n_tokens)),
        "accuracy": float(np.mean([score.is_right for score in scored])),
    }
    return losses | {"tokens": n_tokens, "bytes": n_tokens}, scored


def accuracy_rows(scored: Sequence[Scored], chance: float) -> list[dict[str, Any]]:
    """Returns accuracy over all questions, then by distance in bins 1, 2, 3-4, 5-8, ... segments.

    Returns:
        One dict a bin that has questions: is_total, distance_segments_min and _max (of the bin),
        distance_segments and distance_bytes (means), n, accuracy, accuracy_low and accuracy_high
        (Wilson's 95 % interval), chance, trivial (accuracy of `Task.trivial` on these questions).
    """
    farthest = max((score.answer.distance_segments for score in scored), default=1)
    rows = [_accuracy_row(scored, 1, farthest, chance) | {"is_total": True}]
    low, high = 1, 1
    while low <= farthest:
        here = [score for score in scored if low <= score.answer.distance_segments <= high]
        if here:
            rows.append(_accuracy_row(here, low, min(high, farthest), chance))
        low, high = high + 1, 2 * high
    return rows


def _accuracy_row(scored: Sequence[Scored], low: int, high: int, chance: float) -> dict[str, Any]:
    n, n_right = len(scored), sum(score.is_right for score in scored)
    interval = wilson_interval(n_right, n)
    answers = [score.answer for score in scored]
    return {
        "is_total": False,
        "distance_segments_min": low,
        "distance_segments_max": high,
        "distance_segments": float(np.mean([a.distance_segments for a in answers])),
        "distance_bytes": float(np.mean([a.distance_bytes for a in answers])),
        "n": n,
        "accuracy": n_right / n,
        "accuracy_low": interval[0],
        "accuracy_high": interval[1],
        "chance": chance,
        "trivial": float(np.mean([score.trivial for score in scored])),
    }


def wilson_interval(n_right: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Returns Wilson's score interval of a proportion; (0, 1) for n = 0.

    Source: Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    if n == 0:
        return 0.0, 1.0
    share = n_right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
