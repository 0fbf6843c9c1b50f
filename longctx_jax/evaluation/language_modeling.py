"""Streaming evaluation: negative log-likelihood of a text of any length in constant memory.

The text is cut into a few stripes that advance in parallel, each with its own carried cache, so
every token but the first of a stripe sees all that its cache can hold. Bits per byte are total bits
over raw text bytes, whatever the tokenizer; separators of documents cost bits and stand for no
byte. The first token of a text that no separator precedes is charged log(vocabulary size). Rows of
recall tasks are passed on to `recall.py`.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from longctx_jax.data import RowBatches
from longctx_jax.evaluation.recall import Place, evaluate_rows
from longctx_jax.models.decoder import Decoder, ModelCache
from longctx_jax.nn.partition import everywhere
from longctx_jax.ops.losses import bits_per_byte, token_nll, weighted
from longctx_jax.typing import PyTree

Progress = Callable[[int, float], None]  # tokens done, seconds since the start
# position of the window's first token in its stripe; nats and raw bytes of its targets [rows, seq]
Observer = Callable[[int, np.ndarray, np.ndarray], None]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def eval_step(
    model: Decoder, variables: dict[str, PyTree], batch: dict[str, jax.Array], cache: ModelCache
) -> tuple[jax.Array, ModelCache]:
    """Returns the weighted negative log-likelihoods, nats [rows, seq], and the next cache."""
    out = model.apply(variables, batch["tokens"], cache, segment_ids=batch["segment_ids"])
    assert out.cache is not None
    nll = weighted(token_nll(out.logits, batch["targets"]), batch["weights"])
    return everywhere(nll), out.cache


def evaluate(
    model: Decoder,
    variables: dict[str, PyTree],
    batches: Iterable[dict[str, Any]] | RowBatches,
    *,
    cache_len: int,
    first_token_bytes: int | None = 1,
    n_words: int = 0,
    progress: Progress | None = None,
    observe: Observer | None = None,
    place: Place = lambda tree: tree,
) -> dict[str, float]:
    """Returns the mean losses of a text given as stripes (`data.evaluation_stripes`).

    Args:
        batches: windows in order, fields tokens, targets, weights, segment_ids, target_bytes; or
            rows of a recall task, of which only the answers count and nothing else is charged.
        cache_len: tokens that full attention looks back on.
        first_token_bytes: raw bytes of the text's first token, which is in no window; None = the
            windows have it.
        n_words: words of the text, for `perplexity_per_word`; 0 = not reported.
        progress: called after each window.
        observe: called with the losses of each window of text, e.g. a `PositionCurve`.
        place: puts batches and caches on the devices of a mesh.

    Returns:
        bits_per_byte, nats_per_token, perplexity_per_token, perplexity_per_word (if n_words: the
        exponential of all nats over the number of words), tokens, bytes; of a recall task also
        accuracy, the share of right answers.

    Raises:
        ValueError: if the text is empty or the loss is not finite.
    """
    if isinstance(batches, RowBatches):
        return evaluate_rows(model, variables, batches, progress=progress, place=place)[0]
    cache: ModelCache | None = None
    n_tokens, n_bytes, nats = 0, 0, 0.0
    if first_token_bytes is not None:
        n_tokens, n_bytes, nats = 1, first_token_bytes, math.log(model.config.vocab_size)
    position = 0
    pending: list[tuple[int, jax.Array, np.ndarray]] = []

    def add_oldest() -> float:
        first, nll, target_bytes = pending.pop(0)
        nll = np.asarray(nll, np.float64)
        if observe is not None:
            observe(first, nll, target_bytes)
        return float(np.sum(nll))

    start = time.monotonic()
    for batch in batches:
        if cache is None:
            cache = place(model.init_cache(batch["tokens"].shape[0], cache_len))
        n_tokens += int(np.sum(batch["weights"]))
        n_bytes += int(np.sum(batch["target_bytes"]))
        arrays = place({k: np.asarray(v) for k, v in batch.items() if k != "target_bytes"})
        nll, cache = eval_step(model, variables, arrays, cache)
        pending.append((position, nll, batch["target_bytes"]))
        position += batch["tokens"].shape[1]
        if len(pending) > 1:  # the device works on the newest while the host adds an older one
            nats += add_oldest()
        if progress is not None:
            progress(n_tokens, time.monotonic() - start)
    while pending:
        nats += add_oldest()
    if not math.isfinite(nats):
        raise ValueError(
            f"the loss of this model must be finite: got {nats} nats over {n_tokens} tokens; "
            "evaluate an earlier checkpoint with --step"
        )
    result = {
        "bits_per_byte": bits_per_byte(nats, n_bytes),
        "nats_per_token": nats / n_tokens,
        "perplexity_per_token": math.exp(min(700.0, nats / n_tokens)),
    }
    if n_words:
        result["perplexity_per_word"] = math.exp(min(700.0, nats / n_words))
    return result | {"tokens": n_tokens, "bytes": n_bytes}
