"""Segment-recurrent stacks: cuts a call into segments, runs them, and keeps the unfinished one.

Segments are segment_len tokens of the stream, whatever the calls: a call that starts and ends
anywhere gives the same logits. Three ways through a call, chosen by where the stream stands:

    at a segment's start       whole segments under config.model.schedule, then the first tokens
                               of the next one
    within one segment         its tokens at once, and its end if they reach it
    anything else              piece by piece, none of which passes a segment's end: of gcd(call,
                               segment) tokens if the stream stands at a multiple of that, else of
                               one token, which is slow

RMT's memory is the stack's output, so its segments run one after another; "armt" and "layerwise"
keep theirs in the layers, and run under every schedule.

Source: Bulatov et al. (2022), arXiv 2207.06881; Rodkin et al. (2024), arXiv 2407.04841.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.recurrent_memory.cells import (
    MemoryLayer,
    Rows,
    TokenCache,
    document_tokens,
    one_document,
    surround,
    truncated,
)
from longctx_jax.models.recurrent_memory.state import SegmentCache, State, init_state, make_layers
from longctx_jax.models.schedules import run_stack
from longctx_jax.models.segments import after, cut, join
from longctx_jax.models.stack import (
    layer_names,
    layer_places,
    rematerialize,
    schedule_options,
)
from longctx_jax.nn.contract import Aux, Documents
from longctx_jax.typing import PRNGKey, PyTree

# Folded into the key of what opens and closes a segment; the segments and pieces themselves are
# numbered from 0.
OPEN_KEY, CLOSE_KEY = 2**31 - 1, 2**31 - 2


def apply_recurrence(
    config: ModelConfig,
    params: dict[str, PyTree],
    x: jax.Array,
    documents: Documents | None,
    state: State | None,
    *,
    norm: Callable[[jax.Array], jax.Array],
    key: PRNGKey | None,
    train: bool,
) -> tuple[jax.Array, State | None, Aux]:
    """Runs the stack over [batch, seq, d_model] and returns its output, normed.

    Args:
        params: {"stack", "state", "memory"} as made by `init_stack` and `init_recurrence`.
        state: None = nothing came before, and nothing is wanted back.
        norm: after the last layer; RMT's memory passes through it too.
    """
    if documents is None:
        documents = Documents(jnp.zeros(x.shape[:2], jnp.int32), None)
    run = _Run(config, params, norm, key, make_layers(config, train))
    seq, segment_len = x.shape[1], config.memory.segment_len
    if state is None:
        return run.without_state(x, documents)
    position = state.segment.position[0]
    if seq == 1:
        return run.within_segment(x, documents, state)
    if seq < segment_len:
        is_simple, simple = position + seq <= segment_len, run.within_segment
    else:
        is_simple, simple = position == 0, run.from_segment_start
    length = math.gcd(seq, segment_len)

    def pieces(*inputs):
        if length in (1, seq, segment_len):
            return run.in_pieces(1)(*inputs)
        fits = position % length == 0
        return jax.lax.cond(fits, run.in_pieces(length), run.in_pieces(1), *inputs)

    return jax.lax.cond(is_simple, simple, pieces, x, documents, state)


@dataclasses.dataclass(frozen=True)
class _Run:
    """One call: what all ways through it share."""

    config: ModelConfig
    params: dict[str, PyTree]
    norm: Callable[[jax.Array], jax.Array]
    key: PRNGKey | None
    layers: tuple[MemoryLayer, ...]

    def without_state(self, x, documents):
        """Whole segments, then the rest in one cell that keeps nothing."""
        batch, seq = x.shape[:2]
        state = init_state(self.config, batch, seq)
        segment_len = self.config.memory.segment_len
        # Nobody reads what the end of a lone segment would write.
        n_whole = seq // segment_len if seq > segment_len else 0
        y, auxes = x[:, :0], []
        if n_whole:
            y, state, aux = self._whole_segments(x, documents, state, n_whole)
            auxes.append(aux)
        if seq > n_whole * segment_len:
            x, documents = after((x, documents), n_whole * segment_len)
            state = truncated(self.config, state, n_whole)
            n_before = 0
            if self.config.recurrence == "rmt":
                memory = self._model_tokens(state, documents.index[:, 0])
                n_before = memory.shape[1]
                x = jnp.concatenate([memory, x], axis=1)
                documents = surround(documents, n_before, 0)
            rows = Rows(x, (), documents, jnp.int32(n_whole))
            caches = self._without_inner(state.layers)
            rows, _, aux = self._one("unfinished", rows, caches, n_whole)
            auxes.append(aux)
            tail = self.norm(rows.tokens)[:, n_before:]
            y = jnp.concatenate([y.astype(tail.dtype), tail], axis=1)
        return y, None, _sum(auxes)

    def from_segment_start(self, x, documents, state: State):
        """Whole segments, then the first tokens of the next one."""
        n_whole = x.shape[1] // self.config.memory.segment_len
        y, state, aux = self._whole_segments(x, documents, state, n_whole)
        n_done = n_whole * self.config.memory.segment_len
        if n_done < x.shape[1]:
            x, documents = after((x, documents), n_done)
            tail, state, more = self.within_segment(x, documents, state, n_whole, n_whole)
            y, aux = jnp.concatenate([y, tail], axis=1), _sum([aux, more])
        return y, state, aux

    def within_segment(self, x, documents, state: State, segment: Any = 0, piece: Any = 0):
        """Tokens of one segment: its beginning, or its end, included.

        `segment` counts the call's segments, `piece` what the call has cut them into.
        """
        config, position = self.config, state.segment.position
        is_first = position[0] == 0
        state = truncated(config, state, segment, is_first)
        auxes = []
        if config.recurrence != "armt":  # memory tokens in front of the first token
            state, aux = _when(is_first, lambda s: self._open(documents, s, piece), state)
            auxes.append(aux)
            if documents.reset is not None:  # the memory in front resets what there is to reset
                reset = documents.reset.at[:, 0].set(documents.reset[:, 0] & ~is_first)
                documents = documents._replace(reset=reset)
        rows = Rows(x, (), documents, jnp.asarray(segment, jnp.int32))
        rows, layers, aux = self._one("extend", rows, state.layers, piece)
        auxes.append(aux)
        position = position + x.shape[1]
        state = State(layers, dataclasses.replace(state.segment, position=position))
        is_last = position[0] == config.memory.segment_len
        state, aux = _when(is_last, lambda s: self._close(documents, s, piece), state)
        auxes.append(aux)
        return self.norm(rows.tokens), state, _sum(auxes)

    def in_pieces(self, length: int):
        """Returns what runs any tokens, `length` at a time; no piece may pass a segment's end."""

        def run(x, documents, state: State):
            start, segment_len = state.segment.position[0], self.config.memory.segment_len

            def step(state, inputs):
                piece, (x, documents) = inputs
                segment = (start + piece * length) // segment_len
                y, state, aux = self.within_segment(x, documents, state, segment, piece)
                return state, (y, aux)

            n_pieces = x.shape[1] // length
            pieces = cut((x, documents), n_pieces, length)
            state, (y, aux) = jax.lax.scan(step, state, (jnp.arange(n_pieces), pieces))
            return join(y), state, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), aux)

        return run

    def _whole_segments(self, x, documents, state: State, n: int):
        length = self.config.memory.segment_len
        batch = x.shape[0]
        tokens, documents = cut((x, documents), n, length)
        segments = jnp.arange(n, dtype=jnp.int32)
        caches = self._without_inner(state.layers)
        memory = state.segment.memory
        if self.config.recurrence == "rmt":
            y, memory, aux = self._rmt_segments(tokens, documents, segments, caches, state)
        else:
            rows = Rows(tokens, self._travelling(n, batch), documents, segments)
            rows, caches, aux = self._run("whole", rows, caches)
            y = self.norm(rows.tokens)
        fresh = init_state(self.config, batch, 1)
        layers = tuple(
            new._replace(inner=empty.inner) if layer.is_local else new
            for layer, new, empty in zip(self.layers, caches, fresh.layers, strict=True)
        )
        return join(y), State(layers, SegmentCache(state.segment.position, memory)), aux

    def _rmt_segments(self, tokens, documents, segments, caches, state: State):
        """Runs segments [memory; tokens; memory] one after another."""
        n_memory = self.config.memory.n_memory_tokens

        def step(memory, inputs):
            x, documents, segment = inputs
            memory = truncated(self.config, memory, segment)
            here = State(state.layers, dataclasses.replace(state.segment, memory=memory))
            first, last = documents.index[:, 0], documents.index[:, -1]
            before, after = self._model_tokens(here, first), self._model_tokens(here, last)
            x = jnp.concatenate([before, x, after], axis=1)
            rows = Rows(x, (), surround(documents, n_memory, n_memory), segment)
            rows, _, aux = self._one("unfinished", rows, caches, segment)
            y = self.norm(rows.tokens)
            return TokenCache(y[:, -n_memory:], last), (y[:, n_memory:-n_memory], aux)

        memory, (y, aux) = jax.lax.scan(step, state.segment.memory, (tokens, documents, segments))
        return y, memory, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), aux)

    def _open(self, documents: Documents, state: State, piece):
        first = documents.index[:, 0]
        if self.config.recurrence == "layerwise":
            x = jnp.zeros((first.shape[0], 1, self.config.d_model), self.config.dtype)
            rows = Rows(x, (), one_document(first, 1), jnp.int32(0))
            _, layers, aux = self._one("open", rows, state.layers, piece, OPEN_KEY)
            return State(layers, state.segment), aux
        memory = TokenCache(self._model_tokens(state, first), first)
        documents = one_document(first, memory.tokens.shape[1])
        rows = Rows(memory.tokens, (), documents, jnp.int32(0))
        _, layers, aux = self._one("extend", rows, state.layers, piece, OPEN_KEY)
        return State(layers, dataclasses.replace(state.segment, memory=memory)), aux

    def _close(self, documents: Documents, state: State, piece):
        last = documents.index[:, -1]
        batch, n_memory = last.shape[0], self.config.memory.n_memory_tokens
        if self.config.recurrence == "layerwise":
            tokens = jnp.zeros((batch, 1, self.config.d_model), self.config.dtype)
        elif self.config.recurrence == "rmt":
            tokens = self._model_tokens(state, last)
        else:
            tokens = self._travelling(1, batch)[0]
        documents = one_document(last, tokens.shape[1])
        rows = Rows(tokens, (), documents, jnp.int32(0))
        rows, layers, aux = self._one("close", rows, state.layers, piece, CLOSE_KEY)
        memory = state.segment.memory
        if self.config.recurrence == "rmt":
            memory = TokenCache(self.norm(rows.tokens[:, -n_memory:]), last)
        position = jnp.zeros_like(state.segment.position)
        return State(layers, SegmentCache(position, memory)), aux

    def _travelling(self, n: int, batch: int) -> Any:
        """ARMT's memory tokens for n segments; () where none travel."""
        if "tokens" not in self.params["memory"]:
            return ()
        start = self.params["memory"]["tokens"].astype(self.config.dtype)
        return jnp.broadcast_to(start, (n, batch, *start.shape))

    def _model_tokens(self, state: State, document: jax.Array) -> jax.Array:
        """RMT's memory tokens as a document sees them."""
        start = self.params["memory"]["tokens"].astype(self.config.dtype)
        return document_tokens(state.segment.memory, document, start)

    def _without_inner(self, caches):
        """The caches that whole segments need: a local block starts empty each time."""
        pairs = zip(self.layers, caches, strict=True)
        return tuple(c._replace(inner=()) if layer.is_local else c for layer, c in pairs)

    def _run(self, cell: str, rows: Rows, caches, number: Any = 0, folded: int | None = None):
        """Runs one of the cells in all layers over stacked rows.

        `number` is that of the first segment or piece, and `folded` goes into the key: no two cells
        of a call may share both.
        """
        config, key = self.config, self.key
        if key is not None and folded is not None:
            key = jax.random.fold_in(key, folded)
        places = map(jnp.asarray, layer_places(config))
        stack, state, memory = (self.params[part] for part in ("stack", "state", "memory"))
        stacked = tuple(
            ((stack[name], state.get(name), at), memory["layers"][name])
            for name, at in zip(layer_names(config), places, strict=True)
        )
        return run_stack(
            tuple(rematerialize(config, getattr(layer, cell)) for layer in self.layers),
            stacked,
            rows,
            caches,
            key=key,
            first_segment=number,
            **schedule_options(config),
        )

    def _one(self, cell: str, rows: Rows, caches, number: Any, folded: int | None = None):
        """`_run` for one segment."""
        rows = jax.tree.map(lambda leaf: leaf[None], rows)
        rows, caches, aux = self._run(cell, rows, caches, number, folded)
        return jax.tree.map(lambda leaf: leaf[0], rows), caches, aux


def _when(condition, function, state):
    """Returns function(state) if the condition holds, else (state, aux of zeros)."""
    shapes = jax.eval_shape(function, state)[1]

    def skip(state):
        return state, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    return jax.lax.cond(condition, function, skip, state)


def _sum(auxes):
    return functools.reduce(lambda left, right: jax.tree.map(jnp.add, left, right), auxes)
