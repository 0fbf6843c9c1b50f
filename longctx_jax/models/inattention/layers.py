"""The body of InAttention: one memory of the embeddings, and layers that only read it.

    x0_j = E[token_j] (+ a P[j])        j counted from the start of the document
    m_j  = x0_j / rms(x0_j) (W_down)    the memory, once for all layers
    h <- x0;   per layer:  h += attention(norm h, m);  h += MLP(norm h)

Tokens whose output nobody wants enter the memory and pass through no layer: a prompt costs its
look-up and one token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.models.body import Source, Wanted
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.inattention.cache import choose_cache, d_memory, d_rotary
from longctx_jax.models.segments import run_in_segments
from longctx_jax.models.stack import (
    call_module,
    layer_names,
    make_block,
    output_scale,
    rematerialize,
)
from longctx_jax.nn.blocks import Block
from longctx_jax.nn.contract import Documents, own_documents
from longctx_jax.nn.inattention.attention import InitialAttention, SharedProjections
from longctx_jax.nn.inattention.forms import Sight, project
from longctx_jax.nn.inattention.memory import (
    Counts,
    IdRing,
    KeyMemory,
    Memory,
    RowRing,
    extend_counts,
    extend_ids,
    extend_rows,
    id_dtype,
    init_place,
    walk,
)
from longctx_jax.nn.inattention.rows import RowMaker
from longctx_jax.nn.kv_cache import KVCache, extend, init_kv_cache
from longctx_jax.nn.ring_lending import at_layer, keep_whole, lend, settle
from longctx_jax.ops.position import alibi_slopes
from longctx_jax.typing import PRNGKey, PyTree


def layer_block(config: ModelConfig) -> Block:
    """Returns the block of every layer."""
    c = config.inattention
    mixer = InitialAttention(
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        d_key=config.d_key,
        d_value=config.d_value,
        d_memory=d_memory(config),
        score_position=c.score_position,
        n_exact=c.n_exact,
        max_distance=c.max_distance,
        d_rotary=c.d_rotary,
        rope_theta=c.rope_theta,
        rope_scaling=c.rotary_scaling,
        shares_projections=c.share_projections,
        implementation=c.implementation,
        dtype=config.dtype,
        output_scale=output_scale(config),
    )
    return make_block(config, mixer)


def make_row_maker(config: ModelConfig) -> RowMaker:
    """Returns the module; sinusoids start as large as embeddings."""
    c = config.inattention
    unit = config.embed_scale * config.d_model**-0.5
    return RowMaker(
        position_gain=unit if c.memory_position == "sinusoid" else 0.0,
        d_memory=d_memory(config),
        d_rotary=d_rotary(config),
        rope_theta=c.rope_theta,
        rope_scaling=c.rotary_scaling,
        norm_eps=config.norm_eps,
        dtype=config.dtype,
    )


def make_shared(config: ModelConfig) -> SharedProjections:
    """Returns the projections of all layers, for models that share them."""
    return SharedProjections(config.n_kv_heads, config.d_key, config.d_value, config.dtype)


def init_initial(config: ModelConfig, key: PRNGKey) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Returns parameters: "stack" stacked by layer, "initial" of the memory; there is no state."""
    example = jnp.zeros((1, 1, config.d_model), config.dtype)
    zero = jnp.zeros((1, 1), jnp.int32)
    row_key, shared_key, stack_key = jax.random.split(key, 3)
    maker = make_row_maker(config)
    rows, variables = maker.init_with_output(row_key, example, zero, zero)
    initial = {"rows": variables.get("params", {})}
    shared = None
    if config.inattention.share_projections:
        shared, variables = make_shared(config).init_with_output(shared_key, d_memory(config))
        initial["shared"] = variables["params"]
    sight = Sight(rows[1], zero, zero, zero, None, None, None, None, None, shared, None, None)
    block = layer_block(config)

    def init(layer):
        return block.init(jax.random.fold_in(stack_key, layer), example, sight)["params"]

    stack = jax.vmap(init)(jnp.arange(config.n_layers))
    (name,) = layer_names(config)
    return {"stack": {name: stack}, "initial": initial}, {}


def init_memory(config: ModelConfig, batch_size: int, max_len: int) -> tuple[Any, Memory]:
    """Returns what is remembered before the first token: caches of the layers, and the memory."""
    kind, place = choose_cache(config, max_len), init_place(batch_size)
    if kind == "kv":
        width = config.d_key + d_rotary(config)
        sizes = (batch_size, max_len, config.n_kv_heads, width, config.d_value)
        cache = init_kv_cache(*sizes, config.dtype)
        if config.inattention.share_projections:
            return (), KeyMemory(cache, place)
        n = config.n_layers
        layers = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), cache)
        return layers, KeyMemory(None, place)
    ids = id_dtype(config.vocab_size)
    if kind == "embedding":
        width = d_memory(config) + d_rotary(config)
        return (), RowRing(jnp.zeros((batch_size, max_len, width), config.dtype), place)
    if kind == "ids":
        return (), IdRing(jnp.zeros((batch_size, max_len), ids), place)
    position = config.inattention.score_position
    window = config.inattention.n_exact if position == "near" else 0
    n_rows, kind = 1, jnp.int32
    if position == "alibi":
        n_rows, kind = config.n_heads, jnp.promote_types(config.dtype, jnp.float32)
    counts = jnp.zeros((batch_size, n_rows, config.vocab_size), kind)
    recent = jnp.zeros((batch_size, window), ids) if window else None
    return (), Counts(recent, counts, place)


def apply_initial(
    config: ModelConfig,
    params: dict[str, PyTree],
    state: dict[str, PyTree],
    x: jax.Array,
    documents: Documents | None,
    caches: tuple[Any, Memory] | None,
    *,
    norm: Callable[[jax.Array], jax.Array],
    key: PRNGKey | None,
    train: bool,
    source: Source,
    wanted: Wanted,
) -> tuple[jax.Array, tuple[Any, Memory] | None, tuple[Any, ...]]:
    """Takes the embeddings [batch, seq, d_model] in and runs the wanted tokens; they are normed.

    With config.model.segment_len a call goes on segment by segment, each with the memory of those
    before: time and memory of counts are then linear in the length of the call.

    Args:
        params: as made by `init_initial`.
        state: there is none.
        x: embeddings.
        documents: of the tokens.
        caches: None = nothing came before, and nothing is wanted back.
        norm: after the last layer.
        key: of dropout.
        train: drop out.
        source: of the embeddings.
        wanted: tokens to run; with caches or segments `at` is picked afterwards.
    """
    del state
    batch, seq = source.tokens.shape
    segment_len = config.segment_len
    run = _Run(config, params, norm, train, source.embed)
    if wanted.outputs != "all" or not segment_len or seq <= segment_len:
        return run(x, source.tokens, documents, caches, key, wanted)

    is_kept = caches is not None
    if caches is None:
        caches = init_memory(config, batch, seq)
    if documents is None:
        documents = Documents(jnp.zeros((batch, seq), jnp.int32), None)

    def segment(caches, inputs):
        index, (x, tokens, documents) = inputs
        own_key = None if key is None else jax.random.fold_in(key, index)
        y, caches, aux = run(x, tokens, documents, caches, own_key, Wanted())
        return caches, (y, aux)

    def run_pieces(pieces, caches, first):
        indices = first + jnp.arange(pieces[1].shape[0])
        caches, (ys, aux) = jax.lax.scan(segment, caches, (indices, pieces))
        return ys, caches, jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), aux)

    stream = (x, source.tokens, documents)
    y, caches, aux = run_in_segments(run_pieces, stream, caches, segment_len)
    if wanted.at is not None:
        y = y[:, wanted.at]
    return y, caches if is_kept else None, aux


class _Run(NamedTuple):
    """One call of a memory and its layers."""

    config: ModelConfig
    params: dict[str, PyTree]
    norm: Callable[[jax.Array], jax.Array]
    train: bool
    embed: Callable[[jax.Array], jax.Array]

    def __call__(
        self,
        x: jax.Array,
        tokens: jax.Array,
        documents: Documents | None,
        caches: tuple[Any, Memory] | None,
        key: PRNGKey | None,
        wanted: Wanted,
    ) -> tuple[jax.Array, Any, tuple[Any, ...]]:
        config, initial = self.config, self.params["initial"]
        batch, seq = tokens.shape
        layers, before = ((), None) if caches is None else caches
        place = init_place(batch) if before is None else before.place
        marks = documents or Documents(jnp.zeros((batch, seq), jnp.int32), None)
        positions, starts, place = walk(place, marks, seq)
        x0, rows = self._rows(x, positions, positions - starts)
        shared = None
        if config.inattention.share_projections:
            shared = call_module(make_shared(config), initial["shared"], d_memory(config))

        after = self._extended(before, rows, tokens, positions, documents, shared, place)
        picked = slice(None)
        if wanted.outputs != "all":
            picked = slice(seq - 1, seq)
        elif caches is None and wanted.at is not None:
            picked = wanted.at
        is_all = isinstance(picked, slice) and picked == slice(None)
        segments = own_documents(documents)
        at = positions[:1] if caches is None else positions
        sight = Sight(
            rows=rows,
            ids=tokens,
            positions=at,
            query_positions=at if is_all else at[:, picked],
            query_documents=None if segments is None else segments[:, picked],
            query_starts=starts[:, picked],
            layer_cache=None,
            before=before,
            after=after,
            shared=shared,
            types=self._types(),
            make_rows=self._remade,
        )
        if wanted.outputs == "none" and not layers:
            y, aux = x0[:, :0], ()
        else:
            y, layers, aux = self._through(x0[:, picked], sight, documents, layers, key)
            y = self.norm(y)
        if wanted.outputs == "none":
            y = y[:, :0]
        elif caches is not None and wanted.at is not None:
            y = y[:, wanted.at]
        return y, None if caches is None else (layers, after), aux

    def _rows(self, x, positions, places):
        maker = make_row_maker(self.config)
        return call_module(maker, self.params["initial"]["rows"], x, positions, places)

    def _remade(self, ids, positions, start):
        """Rows of ids at these positions of the document that began at `start`."""
        places = jnp.maximum(positions - start[:, None], 0)
        return self._rows(self.embed(ids), jnp.maximum(positions, 0), places)[1]

    def _types(self):
        """Rows of every id, if they depend on it alone."""
        c = self.config.inattention
        if c.memory_position != "none" or c.score_position == "decoupled":
            return None
        ids = jnp.arange(self.config.vocab_size)[None]
        return self._rows(self.embed(ids), ids, ids)[1][0]

    def _extended(self, before, rows, tokens, positions, documents, shared, place):
        if before is None:
            return None
        if isinstance(before, RowRing):
            return extend_rows(before, rows, place)
        if isinstance(before, IdRing):
            return extend_ids(before, tokens, place)
        if isinstance(before, Counts):
            slopes = None
            if self.config.inattention.score_position == "alibi":
                slopes = jnp.asarray(alibi_slopes(self.config.n_heads), before.counts.dtype)
            return extend_counts(before, tokens, place, slopes)
        if before.keys is None:
            return KeyMemory(None, place)
        key, value = project(layer_block(self.config).mixer, shared, rows, positions)
        return KeyMemory(extend(before.keys, key, value, documents.index), place)

    def _through(self, x, sight: Sight, documents, layers, key):
        """Runs tokens [batch, n, d_model] through the layers."""
        block, (name,) = layer_block(self.config), layer_names(self.config)

        is_token = sight.rows.shape[1] == 1
        lent = lend(layers, stays_whole=is_token) if isinstance(layers, KVCache) else None
        lent, whole = keep_whole(lent)

        def cell(x, inputs):
            index, params, cache = inputs
            rngs = {} if key is None else {"dropout": jax.random.fold_in(key, index)}
            seen = sight._replace(layer_cache=at_layer(cache, whole, index))
            x, cache, aux = call_module(
                block, params, x, seen, documents, train=self.train, rngs=rngs
            )
            return x, (cache, aux)

        inputs = (
            jnp.arange(self.config.n_layers),
            self.params["stack"][name],
            lent,
        )
        cell = rematerialize(self.config, cell)
        x, (caches, aux) = jax.lax.scan(
            cell, x, inputs, unroll=min(self.config.unroll, len(inputs[0]))
        )
        return x, layers if caches is None else settle(layers, caches), (aux,)
