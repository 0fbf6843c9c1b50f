"""What travels between blocks beside the hidden state: documents along the sequence, `Aux` back.

A block is `__call__(x, cache, documents, *, layer, train) -> (y, cache, aux)`. Everything here is
a pytree of arrays.
"""

import math
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp


class Documents(NamedTuple):
    """Which document each token of a call belongs to.

    `reset` is None when the caller gave no segment ids: then the call is all one document (the one
    the cache ended in) and mixers need no mask within it.
    """

    index: jax.Array  # int32 [batch, seq], grows by one at each document start in the stream
    reset: jax.Array | None  # bool [batch, seq], True at the first token of a document
    # float32 [batch, seq], what a token counts in losses, metrics and statistics; None = 1
    weights: jax.Array | None = None


class Mean(NamedTuple):
    """A metric as a sum and a count, so that segments, layers and devices add up exactly."""

    total: jax.Array
    count: jax.Array

    def __float__(self) -> float:
        """The mean, NaN of nothing."""
        count = float(self.count)
        return float(self.total) / count if count else math.nan


@flax.struct.dataclass
class Aux:
    """What a cell reports beside its output. Every leaf is a sum over the tokens it saw."""

    losses: dict[str, jax.Array]  # added to the objective, nats
    metrics: dict[str, Mean]  # logged
    statistics: Any  # what non-gradient state is updated from


def no_aux() -> Aux:
    """Returns an Aux with nothing in it."""
    return Aux(losses={}, metrics={}, statistics={})


def own_documents(documents: Documents | None) -> jax.Array | None:
    """Returns the segment ids to mask with inside one call; None if it holds one document."""
    return None if documents is None or documents.reset is None else documents.index


def advance_documents(
    segment_ids: jax.Array | None,
    last_id: jax.Array,
    last_index: jax.Array,
    seq: int,
    weights: jax.Array | None = None,
) -> tuple[Documents, jax.Array, jax.Array]:
    """Numbers the documents of a stream 0, 1, ... across calls.

    Args:
        segment_ids: int32 [batch, seq]; a change from one token to the next starts a document.
            None = all tokens continue the document before them.
        last_id: id of the last token seen, [batch]; negative = none yet.
        last_index: its document's number, [batch].
        seq: tokens of the call.
        weights: what each token counts in aux, [batch, seq]; None = 1.

    Returns:
        The documents of the call, and the new last_id and last_index.
    """
    if segment_ids is None:
        index = jnp.broadcast_to(last_index[:, None], (*last_index.shape, seq))
        return Documents(index, None, weights), last_id, last_index
    before = jnp.where(last_id < 0, segment_ids[:, 0], last_id)
    previous = jnp.concatenate([before[:, None], segment_ids[:, :-1]], axis=1)
    reset = segment_ids != previous
    index = last_index[:, None] + jnp.cumsum(reset.astype(jnp.int32), axis=1)
    return Documents(index, reset, weights), segment_ids[:, -1], index[:, -1]
