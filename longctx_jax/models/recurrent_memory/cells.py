"""The cells of segment-recurrent stacks: what one layer does with a segment, or a part of it.

    whole    a complete segment at once: read, block over [tokens; memory tokens], write
    extend   some tokens of an unfinished segment, whose attention cache is kept
    open     what goes before the first token of a segment
    close    the memory tokens that end it: read, block, write; the attention cache starts anew

Both ways give the same numbers, because the mixer inside obeys the split law. A *local* layer
starts every segment with an empty cache of its own; the others of a pattern (say Mamba between
ARMT layers) run on from segment to segment, let memory tokens see what came before, and forget
that they were there. Text never sees a memory token, except through the memory.

ARMT (Rodkin et al. 2024, arXiv 2407.04841): memory tokens travel up the stack with their segment;
each layer's matrix A[l] is read in front of its block and written from the block's memory rows.
Layer-wise tokens (ibid., appendix F.2): each layer has memory tokens of its own, in front of the
segment for reading and behind it for writing; what the block makes of the latter is the memory.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import call_module
from longctx_jax.nn.blocks import Block
from longctx_jax.nn.contract import Aux, Documents, Mean
from longctx_jax.nn.memory import EMPTY, AssociativeMemory, MemoryCache
from longctx_jax.typing import PRNGKey, PyTree

SEE_KEY = 1  # folded into a cell's key for the memory rows that its block sees apart


class Rows(NamedTuple):
    """What travels from layer to layer."""

    tokens: jax.Array  # [batch, tokens, model]
    memory: Any  # [batch, memory tokens, model] at the end of a whole segment; else ()
    documents: Documents  # of the tokens
    segment: jax.Array  # int32 [], counted in the call


class LayerCache(NamedTuple):
    """What stays with a layer."""

    inner: Any  # the block's cache: of the unfinished segment, or of all tokens so far
    memory: Any  # MemoryCache, TokenCache, or () in layers without memory


@flax.struct.dataclass
class TokenCache:
    """Memory tokens and the document that they belong to."""

    tokens: jax.Array  # [batch, memory tokens, model]
    document: jax.Array  # int32 [batch]; EMPTY = none yet


@dataclasses.dataclass(frozen=True)
class MemoryLayer:
    """One pattern position: its block, its memory, and the four cells. Owns no arrays."""

    config: ModelConfig
    kind: str
    block: Block
    train: bool

    @property
    def is_local(self) -> bool:
        """Whether the block's cache ends with the segment."""
        return self.config.recurrence != "armt" or self.kind == "armt"

    @property
    def associative(self) -> AssociativeMemory | None:
        """The matrix of an ARMT layer."""
        return make_associative(self.config) if self.kind == "armt" else None

    @property
    def has_tokens(self) -> bool:
        """Whether the layer has memory tokens of its own."""
        return self.config.recurrence == "layerwise"

    def init_params(self, key: PRNGKey) -> PyTree:
        """Returns the memory's parameters of one layer, {} without any."""
        c = self.config
        if self.has_tokens:
            shape = (c.memory.n_memory_tokens, c.d_model)
            return {"tokens": jax.random.normal(key, shape, jnp.float32)}
        if self.associative is None:
            return {}
        example = jnp.zeros((1, 1, c.d_model), c.dtype)
        return self.associative.init(key, example, self.associative.init_cache(1))["params"]

    def init_inner(self, batch_size: int, max_len: int) -> PyTree:
        """Returns the block's empty cache: of a segment, if local, and its memory tokens."""
        memory = self.config.memory
        if self.is_local:
            longest = memory.segment_len + 2 * memory.n_memory_tokens
        else:  # room for the memory tokens behind max_len tokens, for as long as a write lasts
            longest = max_len + memory.n_memory_tokens
        return self.block.init_cache(batch_size, longest)

    def init_memory(self, batch_size: int) -> Any:
        """Returns the empty memory."""
        if self.has_tokens:
            shape = (batch_size, self.config.memory.n_memory_tokens, self.config.d_model)
            none = jnp.full((batch_size,), EMPTY, jnp.int32)
            return TokenCache(jnp.zeros(shape, self.config.dtype), none)
        return () if self.associative is None else self.associative.init_cache(batch_size)

    # Cells: (layer_params, rows, cache, key) -> (rows, cache, aux), as schedules call them.
    # A local layer's `cache.inner` is () in and out of `whole`.

    def whole(self, layer_params, rows: Rows, cache: LayerCache, key=None):
        """Runs a complete segment, and writes."""
        cache = truncated(self.config, cache, rows.segment)
        return self._segment(layer_params, rows, cache, key, writes=True)

    def unfinished(self, layer_params, rows: Rows, cache: LayerCache, key=None):
        """Runs the first tokens of a segment of which nothing is wanted back."""
        return self._segment(layer_params, rows, cache, key, writes=False)

    def _segment(self, layer_params, rows: Rows, cache: LayerCache, key, writes: bool):
        call = _Call(self, layer_params, key)
        documents, memory = rows.documents, cache.memory
        n_tokens = rows.tokens.shape[1]
        first, last = documents.index[:, 0], documents.index[:, -1]
        before, after = rows.tokens[:, :0], rows.tokens[:, :0]
        if self.has_tokens:
            before = call.memory_tokens(memory, first)
            if writes:
                after = call.memory_tokens(memory, last)
        elif writes:
            after = rows.memory
        x = jnp.concatenate([before, rows.tokens, after], axis=1)
        n_before, n_after = before.shape[1], after.shape[1]
        around = surround(documents, n_before, n_after)
        gamma = None
        if self.associative is not None:
            x = call.read(x, around.index, memory)
        if self.is_local:
            is_plain = documents.reset is None and documents.weights is None
            x, _, aux = call.block(x, None, None if is_plain else around)
            inner = ()
        else:
            tokens, inner, aux = call.block(x[:, :n_tokens], cache.inner, documents)
            x, aux = call.see(tokens, x[:, n_tokens:], inner, aux, last)
        tokens, after = x[:, n_before : n_before + n_tokens], x[:, n_before + n_tokens :]
        if writes and self.has_tokens:
            memory = TokenCache(after.astype(memory.tokens.dtype), last)
        elif writes and self.associative is not None:
            memory, gamma = call.write(after, last, memory)
        is_travelling = writes and not self.has_tokens
        rows = rows._replace(tokens=tokens, memory=after if is_travelling else rows.memory)
        return rows, LayerCache(inner, memory), self._measured(aux, gamma)

    def open(self, layer_params, rows: Rows, cache: LayerCache, key=None):
        """Shows a layer's own memory tokens to its block; rows pass by."""
        call = _Call(self, layer_params, key)
        first = rows.documents.index[:, 0]
        tokens = call.memory_tokens(cache.memory, first)
        _, inner, aux = call.block(tokens, cache.inner, one_document(first, tokens.shape[1]))
        return rows, LayerCache(inner, cache.memory), self._measured(aux, None)

    def extend(self, layer_params, rows: Rows, cache: LayerCache, key=None):
        """Runs tokens of an unfinished segment."""
        call = _Call(self, layer_params, key)
        x = rows.tokens
        if self.associative is not None:
            x = call.read(x, rows.documents.index, cache.memory)
        x, inner, aux = call.block(x, cache.inner, rows.documents)
        return rows._replace(tokens=x), LayerCache(inner, cache.memory), self._measured(aux, None)

    def close(self, layer_params, rows: Rows, cache: LayerCache, key=None):
        """Runs the memory tokens, here as rows.tokens, after the segment's last token; writes."""
        call = _Call(self, layer_params, key)
        x, memory, last = rows.tokens, cache.memory, rows.documents.index[:, -1]
        gamma = None
        if self.has_tokens:
            x = call.memory_tokens(memory, last)
        if self.associative is not None:
            x = call.read(x, rows.documents.index, memory)
        y, _, aux = call.block(x, cache.inner, one_document(last, x.shape[1]))
        if self.has_tokens:
            memory = TokenCache(y.astype(memory.tokens.dtype), last)
        elif self.associative is not None:
            memory, gamma = call.write(y, last, memory)
        inner = cache.inner
        if self.is_local:
            inner = self.init_inner(x.shape[0], 1)
        rows = rows if self.has_tokens else rows._replace(tokens=y)
        return rows, LayerCache(inner, memory), self._measured(aux, gamma)

    def _measured(self, aux: Aux, gamma: jax.Array | None) -> Aux:
        """Adds how much of the written keys was new to an ARMT layer's metrics."""
        if self.associative is None:
            return aux
        zero = jnp.zeros((), jnp.float32)
        mean = Mean(zero, zero)
        if gamma is not None:
            mean = Mean(jnp.sum(gamma).astype(jnp.float32), jnp.float32(gamma.size))
        return dataclasses.replace(aux, metrics={**aux.metrics, "memory_gamma": mean})


@dataclasses.dataclass(frozen=True)
class _Call:
    """A layer with its parameters: ((block, state, place), memory)."""

    layer: MemoryLayer
    layer_params: Any
    key: PRNGKey | None

    def block(self, x, cache, documents):
        (params, state, place), _ = self.layer_params
        rngs = {} if self.key is None else {"dropout": self.key}
        options = {"layer": place, "train": self.layer.train, "rngs": rngs}
        return call_module(self.layer.block, params, x, cache, documents, state=state, **options)

    def see(self, tokens, memory, inner, aux: Aux, last):
        """Runs memory tokens behind the tokens; the block's cache will not know."""
        if memory.shape[1] == 0:
            return tokens, aux
        key = None if self.key is None else jax.random.fold_in(self.key, SEE_KEY)
        apart = dataclasses.replace(self, key=key)
        memory, _, more = apart.block(memory, inner, one_document(last, memory.shape[1]))
        return jnp.concatenate([tokens, memory], axis=1), jax.tree.map(jnp.add, aux, more)

    def memory_tokens(self, memory: TokenCache, document: jax.Array) -> jax.Array:
        start = self.layer_params[1]["tokens"].astype(memory.tokens.dtype)
        return document_tokens(memory, document, start)

    def read(self, x, documents, memory: MemoryCache):
        module, params = make_associative(self.layer.config), self.layer_params[1]
        return x + call_module(module, params, x, documents, memory, method="read")

    def write(self, rows, document, memory: MemoryCache):
        module, params = make_associative(self.layer.config), self.layer_params[1]
        return call_module(module, params, rows, document, memory, method="write")


def make_associative(config: ModelConfig) -> AssociativeMemory:
    """Returns the module of an ARMT layer's memory."""
    memory = config.memory
    return AssociativeMemory(
        d_model=config.d_model,
        d_memory=memory.d_memory,
        nu=memory.nu,
        n_heads=memory.n_heads,
        correction=memory.correction,
        use_denominator=memory.use_denominator,
        normalize=memory.normalize,
        eps=memory.eps,
        dtype=config.dtype,
    )


def truncated(config: ModelConfig, state: PyTree, segment: Any, is_start: Any = True) -> PyTree:
    """Returns the state without its gradient, where back-propagation ends; else as it is.

    Args:
        state: what is known in front of the segment's tokens.
        segment: counted in the call; the ends are in front of every bptt_segments-th.
        is_start: whether these tokens are the segment's first.
    """
    every = config.memory.bptt_segments
    if not every:
        return state
    is_end = (segment % every == 0) & is_start
    return jax.tree.map(lambda a: jnp.where(is_end, jax.lax.stop_gradient(a), a), state)


def document_tokens(memory: TokenCache, document: jax.Array, start: jax.Array) -> jax.Array:
    """Returns a document's memory tokens [batch, tokens, model]; the learned start if it is new."""
    is_kept = (memory.document == document)[:, None, None]
    return jnp.where(is_kept, memory.tokens, start)


def one_document(document: jax.Array, seq: int) -> Documents:
    """Returns the documents of seq rows that all continue one, [batch]."""
    return Documents(jnp.broadcast_to(document[:, None], (document.shape[0], seq)), None)


def surround(documents: Documents, n_before: int, n_after: int) -> Documents:
    """Returns the documents with rows of the first one in front and of the last one behind."""
    batch = documents.index.shape[0]

    def pad(x, fill=None):
        ends = ((x[:, :1], n_before), (x[:, -1:], n_after))
        before, after = (
            jnp.broadcast_to(end if fill is None else jnp.asarray(fill, x.dtype), (batch, n))
            for end, n in ends
        )
        return jnp.concatenate([before, x, after], axis=1)

    reset = documents.reset
    if reset is not None and n_before:
        # What resets in front of the segment's first token now does in front of its memory.
        reset = reset.at[:, 0].set(False)
    weights = documents.weights
    return Documents(
        pad(documents.index),
        None if reset is None else pad(reset, False),
        None if weights is None else pad(weights),
    )
