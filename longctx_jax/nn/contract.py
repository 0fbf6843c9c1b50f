"""The contract: what a mixer is, and what travels between blocks beside the hidden state.

A block, and a mixer inside it, is `__call__(x, cache, documents, *, layer, train) -> (y, cache,
aux)`. `Mixer` is what a mixer's file says of itself; documents go along the sequence, `Aux` back.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

# Of a stream that has had no segment id yet: no id that is >= 0, nor one a caller would take for
# padding, so that a negative id that could not be refused (inside jit) is a document like others.
NO_SEGMENT = -(2**31)


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
        last_id: id of the last token seen, int32 [batch]; NO_SEGMENT = none yet.
        last_index: its document's number, [batch].
        seq: tokens of the call.
        weights: what each token counts in aux, [batch, seq]; None = 1.

    Returns:
        The documents of the call, and the new last_id and last_index.
    """
    if segment_ids is None:
        index = jnp.broadcast_to(last_index[:, None], (*last_index.shape, seq))
        return Documents(index, None, weights), last_id, last_index
    segment_ids = segment_ids.astype(jnp.int32)  # the cache keeps one dtype whatever is given
    before = jnp.where(last_id == NO_SEGMENT, segment_ids[:, 0], last_id)
    previous = jnp.concatenate([before[:, None], segment_ids[:, :-1]], axis=1)
    reset = segment_ids != previous
    index = last_index[:, None] + jnp.cumsum(reset.astype(jnp.int32), axis=1)
    return Documents(index, reset, weights), segment_ids[:, -1], index[:, -1]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a mixer knows of the model around it; widths are filled in, none is 0.

    Attributes:
        d_model: width of the residual stream.
        n_heads: query heads, of width d_key.
        n_kv_heads: key heads, and value heads of width d_value; it divides n_heads.
        n_layers: of the stack, for initial values that depend on depth.
        dtype: of what goes into matrix products.
        output_scale: standard deviation of the output projection, relative to 1/sqrt(fan in): the
            variance of the residual stream stays O(1).
        norm_eps: of norms that the mixer has.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    d_key: int
    d_value: int
    n_layers: int = 1
    dtype: str = "float32"
    output_scale: float = 1.0
    norm_eps: float = 1e-6


class Call(NamedTuple):
    """The call whose costs are asked for.

    Attributes:
        seq_len: tokens of the call.
        n_past: tokens of the stream before it that the caches have seen.
        cache_len: tokens that full attention looks back on, its own included; 0 = all.
        pairs: "visible" (query, key) pairs, or "dense": as forms compute them that mask.
    """

    seq_len: int
    n_past: int = 0
    cache_len: int = 0
    pairs: str = "visible"


class Costs(NamedTuple):
    """What a mixer costs in a call, by formula.

    Attributes:
        flops: of matrix products, a multiply and an add each; the mean of the call's tokens.
        rows: numbers a token, in dtype, that exist at the widest point of the mixer.
        scores: float32 numbers a row of the batch beside them: scores, copies counted.
    """

    flops: float
    rows: int
    scores: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Mixer:
    """All that the rest of the code knows of a mixer; compared by identity.

    Attributes:
        config: frozen dataclass of the mixer's fields, with defaults, which checks itself; they are
            `config.model.<kind>`.
        build: (sizes, fields) -> the Linen module: `__call__` as above, with `cache=None` meaning
            empty and not wanted back, and `init_cache(batch_size, max_len)`. A module that keeps
            state without gradients, in the collection "model_state", has `update_state(state,
            statistics, key)` and `describe_state(state)`; one that draws random numbers in training
            says so by `is_random`. Raises ValueError where sizes and fields contradict each other.
        costs: (sizes, fields, call) -> Costs.
        rules: (pattern, axes) pairs, searched for in the paths of the mixer's parameters before the
            general ones: how their last dimensions lie on a mesh ("data", "model", None).
        examples: names of variants -> changes of `config.model`, small enough to try on 16 numbers
            and 2 heads: what every law of the code is tested with.
    """

    config: type
    build: Callable[[Sizes, Any], Any]
    costs: Callable[[Sizes, Any, Call], Costs]
    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    examples: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
