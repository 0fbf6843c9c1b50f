"""Attention of the hidden state to the initial embeddings of the tokens: InAttention.

    k_j = (g * m_j) W_K,   v_j = (g * m_j) W_V       m_j: normed embedding of token j, of all layers
    out_i = sum_j softmax_j(q_i . k_j / sqrt(K) + bias(i - j)) v_j,   j <= i,   q_i = h_i W_Q

No layer reads what another token became, so one memory serves all layers, and a token whose output
nobody wants passes through none. Four exact ways to go on from a cache: keys and values a layer;
the rows m, absorbed, (q W_K^T) . m; the ids they are made of; how often each id occurred.

Source: Eisner (2024), arXiv 2410.07063, whose positions and normalisation are not public: these are
ours. Absorption: Yan et al. (2021), arXiv 2105.04779. Rotary rows beside the content: DeepSeek-AI
(2024), arXiv 2405.04434.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.nn.contract import Aux, Documents, no_aux, own_documents
from longctx_jax.nn.initial_memory import Counts, IdRing, KeyMemory, RowRing, slot_positions
from longctx_jax.nn.kv_cache import KVCache, NewTokens, attend_ring, cached_attention, extend
from longctx_jax.nn.mlp import Kernel, dense
from longctx_jax.ops.attention import (
    NEVER,
    Keys,
    Partial,
    attention_partial,
    empty_partial,
    merge_partial_attention,
)
from longctx_jax.ops.cache_attention import Cached, attend_cache
from longctx_jax.ops.position import DistanceBias, RotaryScaling, alibi_slopes, rotate
from longctx_jax.ops.vocabulary import attend_counts, attend_ids
from longctx_jax.ops.vq import VQState, vq_attention
from longctx_jax.ops.vq.table import NO_DOCUMENT, Table

# relative: a learned bias a distance, by buckets from n_exact on; near: nothing from there on;
# alibi: fixed slopes; decoupled: rotary rows beside the content; rotary: as in a transformer
SCORE_POSITIONS = ("relative", "near", "alibi", "decoupled", "rotary", "none")
TILE_LEN = 4096  # ids whose rows exist at once


class Projections(NamedTuple):
    """W_K and W_V with the gain in them."""

    key: jax.Array  # [d_memory, kv_heads, key]
    value: jax.Array  # [d_memory, kv_heads, value]


class Sight(NamedTuple):
    """What the tokens of a call may attend to: what a block hands on in place of a cache."""

    rows: jax.Array  # of the call's tokens, [batch, seq, d_memory + d_rotary]
    ids: jax.Array  # of the same, int32 [batch, seq]
    positions: jax.Array  # of the same, in the stream, int32 [batch or 1, seq]
    query_positions: jax.Array  # of the tokens in the layers, int32 [batch or 1, n]
    query_documents: jax.Array | None  # of the same, int32 [batch or 1, n]
    query_starts: jax.Array | None  # positions of their documents' first tokens, int32 [batch, n]
    layer_cache: KVCache | None  # of this layer, before the call
    before: Any  # memory of all layers before the call; None = nothing came before
    after: Any  # the same after it
    shared: Projections | None  # of all layers; None = each has its own
    types: jax.Array | None  # rows of every id, [vocab, d_memory], where they depend on it alone
    # (ids, positions, start of their document) -> rows, where rows depend on more
    make_rows: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None


def projections(
    module: nn.Module, d_memory: int, n_kv_heads: int, d_key: int, d_value: int, dtype: str
) -> Projections:
    """Returns the parameters "gain", "key" and "value" of the (compact) module as kernels."""
    gain = module.param("gain", nn.initializers.ones, (d_memory,), jnp.float32)
    gain = gain[:, None, None].astype(dtype)
    key = Kernel(n_kv_heads * d_key, dtype, name="key")(d_memory)
    value = Kernel(n_kv_heads * d_value, dtype, name="value")(d_memory)
    return Projections(
        gain * key.reshape(d_memory, n_kv_heads, d_key),
        gain * value.reshape(d_memory, n_kv_heads, d_value),
    )


class SharedProjections(nn.Module):
    """Gain, W_K and W_V that all layers use."""

    n_kv_heads: int
    d_key: int
    d_value: int
    dtype: str

    @nn.compact
    def __call__(self, d_memory: int) -> Projections:
        """Returns the kernels."""
        return projections(self, d_memory, self.n_kv_heads, self.d_key, self.d_value, self.dtype)


def slanted(n_heads: int, n_exact: int, max_distance: int) -> np.ndarray:
    """Returns the bias that learning starts with, [heads, buckets]: ALiBi's, head by head.

    Attention to embeddings has nothing but its positions to find the words around a token with, so
    it starts near. Without max_distance the table ends at 0 where nothing is added any more.
    """
    slopes, exact = alibi_slopes(n_heads)[:, None], np.arange(n_exact, dtype=np.float64)
    if not max_distance:
        return slopes * (n_exact - exact)
    growing = n_exact * (max_distance / n_exact) ** (exact / n_exact)
    return -slopes * np.concatenate([exact, growing])


class InitialAttention(nn.Module):
    """Projections, causal softmax attention to the memory, output projection.

    Attributes:
        n_kv_heads: n_heads = MHA, 1 = MQA, between = GQA; the memory's size does not depend on it.
        d_memory: width of the memory's rows, without rotary ones.
        score_position: one of SCORE_POSITIONS.
        n_exact: relative, near: distances with a bias of their own.
        max_distance: relative: farther tokens share a bias.
        d_rotary: decoupled: numbers of a row that are rotated, shared by all heads and layers.
        shares_projections: W_K and W_V come from outside.
        output_scale: as in `SoftmaxAttention`.
    """

    n_heads: int
    n_kv_heads: int
    d_key: int
    d_value: int
    d_memory: int
    score_position: str
    n_exact: int
    max_distance: int
    d_rotary: int
    rope_theta: float
    rope_scaling: RotaryScaling
    shares_projections: bool
    implementation: str
    dtype: str
    output_scale: float

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: Sight,
        documents: Documents | None,
        *,
        layer: jax.Array | None = None,
        train: bool,
    ) -> tuple[jax.Array, KVCache | NewTokens | None, Aux]:
        """Maps [batch, n, d_model] to the same, and this layer's cache to the one after the call.

        Args:
            x: normed, of the n tokens that are in the layers.
            cache: what they may attend to.
            documents: of all tokens of the call.
            layer: not used.
            train: rules out forms without all gradients.
        """
        del layer
        sight = cache
        query = dense(self.n_heads * self.d_key, self.dtype, "query")(x)
        query = query.reshape(*x.shape[:2], self.n_heads, self.d_key)
        turned = None
        if self.score_position == "rotary":
            query = rotate(query, sight.query_positions, self.rope_theta, self.rope_scaling)
        elif self.score_position == "decoupled":
            turned = dense(self.n_heads * self.d_rotary, self.dtype, "rotary_query")(x)
            turned = turned.reshape(*x.shape[:2], self.n_heads, self.d_rotary)
            turned = rotate(turned, sight.query_positions, self.rope_theta, self.rope_scaling)
        kernels = sight.shared
        if not self.shares_projections:
            sizes = (self.n_kv_heads, self.d_key, self.d_value)
            kernels = projections(self, self.d_memory, *sizes, self.dtype)
        assert kernels is not None

        parts = _Parts(query, turned, kernels, self._bias())
        kept = None
        if sight.after is None:
            out = self._alone(parts, sight, documents)
        elif isinstance(sight.after, KeyMemory):
            out, kept = self._from_keys(parts, sight, documents)
        elif x.shape[1] > 1:
            out = self._from_window(parts, sight, documents, train)
        elif isinstance(sight.after, RowRing):
            out = self._from_rows(parts, sight)
        elif isinstance(sight.after, IdRing):
            out = self._from_ids(parts, sight)
        else:
            out = self._from_counts(parts, sight)
        out = out.reshape(*x.shape[:2], -1)
        return dense(x.shape[-1], self.dtype, "out", self.output_scale)(out), kept, no_aux()

    def _bias(self) -> DistanceBias | None:
        if self.score_position == "alibi":
            wide = jnp.promote_types(self.dtype, jnp.float32)
            return DistanceBias(slopes=jnp.asarray(alibi_slopes(self.n_heads), wide))
        if self.score_position not in ("relative", "near"):
            return None
        max_distance = 0 if self.score_position == "near" else self.max_distance

        def start(key):
            del key
            return jnp.asarray(slanted(self.n_heads, self.n_exact, max_distance), jnp.float32)

        return DistanceBias(self.param("relative_bias", start), max_distance)

    @property
    def _scale(self) -> float:
        turned = self.d_rotary if self.score_position == "decoupled" else 0
        return (self.d_key + turned) ** -0.5

    @property
    def _own_form(self) -> str:
        """The implementation of attention among the tokens of a call."""
        return "auto" if self.implementation == "vq" else self.implementation

    def _alone(self, parts: "_Parts", sight: Sight, documents: Documents | None) -> jax.Array:
        """Nothing came before: the tokens of the call, or some of them, attend to its rows."""
        key, value = self.keys(parts.kernels, sight.rows, sight.positions)
        segments = own_documents(documents)
        where = Keys(sight.query_positions, sight.positions, sight.query_documents, segments)
        return attention_partial(
            parts.whole_query,
            key,
            value,
            where,
            is_aligned=sight.query_positions is sight.positions,
            needs_normalizer=False,
            relative_bias=parts.bias,
            implementation=self._own_form,
        ).out

    def _from_keys(self, parts: "_Parts", sight: Sight, documents):
        """A cache of keys and values: of the layer, or (shared projections) of all layers."""
        own = sight.layer_cache
        key, value = self.keys(parts.kernels, sight.rows, sight.positions)
        if parts.query.shape[1] > 1 or (own is not None and key.shape[1] == 1):
            past = sight.before.keys if own is None else own
            out, kept = cached_attention(
                parts.whole_query,
                key,
                value,
                past,
                documents,
                window_len=0,
                relative_bias=parts.bias,
                implementation=self._own_form,
            )
            return out, None if own is None else kept
        kept = None if own is None else extend(own, key, value, documents.index)
        ring = sight.after.keys if kept is None else kept
        at = sight.query_positions
        out = attend_ring(parts.whole_query, ring, at, documents.index[:, -1:], parts.bias).out
        return out, kept

    def _from_window(self, parts: "_Parts", sight: Sight, documents, train: bool) -> jax.Array:
        """Several tokens attend to themselves and to what a memory of all layers holds."""
        if self._is_quantized(sight, train):
            return self._quantized(parts, sight, documents)
        key, value = self.keys(parts.kernels, sight.rows, sight.positions)
        past, query = sight.before, parts.whole_query
        options = {"relative_bias": parts.bias, "implementation": self._own_form}
        if not isinstance(past, Counts):
            old = self._ring_of_keys(past, parts.kernels, sight, documents)
            return cached_attention(query, key, value, old, documents, window_len=0, **options)[0]
        segments = own_documents(documents)
        where = Keys(sight.query_positions, sight.positions, segments, segments)
        own = attention_partial(query, key, value, where, is_aligned=True, **options)
        tables = parts.tables(sight.types)
        near, far = self._of_counts(past, parts.query, tables, parts, sight)
        return _merge(own, near, far)

    def _is_quantized(self, sight: Sight, train: bool) -> bool:
        """Whether to attend as if ids were codes; old keys would get no gradients in training."""
        return self.implementation == "vq" and isinstance(sight.before, Counts) and not train

    def _quantized(self, parts: "_Parts", sight: Sight, documents: Documents) -> jax.Array:
        """Transformer-VQ's attention with the tables by id as codebook: nothing is rounded."""
        past, window = sight.before, self.n_exact
        key_table, value_table = parts.tables(sight.types)
        slots = slot_positions(past.place, window)
        marks = jnp.broadcast_to(_newest_document(documents), slots.shape)

        def by_head(ids):
            ids = ids.astype(jnp.int32)[..., None]
            return jnp.broadcast_to(ids, (*ids.shape[:2], self.n_kv_heads))

        values = jnp.moveaxis(value_table, 0, 1)[None]
        counts = jnp.broadcast_to(past.counts, (len(slots), self.n_kv_heads, len(key_table)))
        table = Table(
            jnp.broadcast_to(values, (*counts.shape, self.d_value)).astype(
                jnp.promote_types(self.dtype, jnp.float32)
            ),
            counts,
            jnp.where(jnp.sum(past.counts, axis=(1, 2)) > 0, marks[:, 0], NO_DOCUMENT),
        )
        state = VQState(
            key=key_table[past.ids],
            value=value_table[past.ids],
            codes=by_head(past.ids),
            documents=jnp.where(slots >= 0, marks, NO_DOCUMENT),
            table=table,
            position=past.place.position,
        )
        assert parts.bias is not None and parts.bias.table is not None
        bias = jnp.broadcast_to(
            parts.bias.table.astype(parts.query.dtype),
            (*parts.query.shape[:2], *parts.bias.table.shape),
        )
        return vq_attention(
            parts.query,
            key_table[sight.ids],
            value_table[sight.ids],
            jnp.moveaxis(key_table, 0, 1),
            state,
            codes=by_head(sight.ids),
            relative_bias=bias,
            documents=documents.index,
            window_len=window,
            scale=self._scale,
        ).out

    def _ring_of_keys(self, past: RowRing | IdRing, kernels, sight: Sight, documents) -> KVCache:
        """Makes the keys and values of a whole ring."""
        capacity = (past.rows if isinstance(past, RowRing) else past.ids).shape[1]
        slots = slot_positions(past.place, capacity)
        if isinstance(past, RowRing):
            rows = past.rows
        elif sight.types is not None:
            rows = sight.types[past.ids]
        else:
            assert sight.make_rows is not None
            rows = sight.make_rows(past.ids, slots, past.place.start)
        key, value = self.keys(kernels, rows, slots)
        marks = jnp.broadcast_to(_newest_document(documents), slots.shape)
        key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
        return KVCache(key, value, slots, marks, past.place.position)

    def _from_rows(self, parts: "_Parts", sight: Sight) -> jax.Array:
        """One token against the rows: <q, m W_K> = <q W_K^T, m>, (P m) W_V = P (m W_V)."""
        ring = sight.after
        slots = slot_positions(ring.place, ring.rows.shape[1])
        found = self._attend_rows(self._absorbed(parts), ring.rows, slots, parts, sight)
        return self._projected(found.out, parts.kernels)

    def _from_ids(self, parts: "_Parts", sight: Sight) -> jax.Array:
        """One token against ids: through tables by id, or tile by tile with rows made anew."""
        ring = sight.after
        capacity = ring.ids.shape[1]
        slots = slot_positions(ring.place, capacity)
        if sight.types is not None:
            where = Keys(sight.query_positions, slots)
            options = {"relative_bias": parts.bias, "scale": self._scale}
            types, ids = sight.types[:, None], ring.ids.astype(jnp.int32)
            found = attend_ids(self._absorbed(parts), types, types, ids, where, **options)
            return self._projected(found.out, parts.kernels)
        tile = min(TILE_LEN, capacity)
        padding = [(0, 0), (0, -capacity % tile)]
        tiles = (jnp.pad(ring.ids, padding), jnp.pad(slots, padding, constant_values=NEVER))
        tiles = tuple(jnp.moveaxis(x.reshape(x.shape[0], -1, tile), 1, 0) for x in tiles)
        absorbed = self._absorbed(parts)

        def add_tile(total, inputs):
            ids, slots = inputs
            assert sight.make_rows is not None
            rows = sight.make_rows(ids, slots, ring.place.start)
            found = self._attend_rows(absorbed, rows, slots, parts, sight)
            wide = Partial(found.out.astype(total.out.dtype), found.log_normalizer)
            return merge_partial_attention(total, wide), None

        shape = (*absorbed.shape[:3], self.d_memory)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        start = Partial(jnp.zeros(shape, wide), jnp.full(shape[:3], -jnp.inf, wide))
        found, _ = jax.lax.scan(add_tile, start, tiles)
        return self._projected(found.out.astype(self.dtype), parts.kernels)

    def _from_counts(self, parts: "_Parts", sight: Sight) -> jax.Array:
        """One token against the newest ids, and all others as a histogram."""
        assert sight.types is not None
        types = sight.types[:, None]  # one head of rows, which the query absorbs the projections of
        near, far = self._of_counts(
            sight.after, self._absorbed(parts), (types, types), parts, sight
        )
        return self._projected(_merge(near, far), parts.kernels)

    def _of_counts(
        self, memory: Counts, query: jax.Array, tables, parts: "_Parts", sight: Sight
    ) -> list[Partial]:
        """Attention to the ring of ids and to the histogram, as they stand in `memory`.

        Args:
            memory: before or after the tokens of the call.
            query: that meets the tables.
            tables: keys and values by id, [vocab, heads of them, ...].
            parts: for the bias.
            sight: where the queries stand.
        """
        key_table, value_table = tables
        place = memory.place
        reference = place.position[:, None] - 1  # that counts are as old as
        is_seen = sight.query_starts == place.start[:, None]
        offset = jnp.where(is_seen, 0.0, -jnp.inf)[:, None]
        if parts.bias is not None and parts.bias.slopes is not None:
            slopes = parts.bias.slopes
            age = (sight.query_positions - reference)[:, None].astype(slopes.dtype)
            offset = offset - slopes[:, None] * age
        counts = memory.counts.astype(jnp.promote_types(self.dtype, jnp.float32))
        far = attend_counts(query, key_table, value_table, counts, offset, scale=self._scale)
        if memory.ids is None:
            return [empty_partial(far), far]
        slots = slot_positions(place, memory.ids.shape[1])
        marks = jnp.broadcast_to(place.start[:, None], slots.shape)
        where = Keys(sight.query_positions, slots, sight.query_starts, marks)
        near = attention_partial(
            query, key_table[memory.ids], value_table[memory.ids], where,
            relative_bias=parts.bias, scale=self._scale,
        )  # fmt: skip
        return [near, far]

    def keys(self, kernels: Projections, rows: jax.Array, positions: jax.Array):
        """Returns keys and values [batch, rows, kv_heads, ...] of rows at these positions."""
        content = rows[..., : self.d_memory]
        key = jnp.einsum("bsd,dgk->bsgk", content, kernels.key)
        value = jnp.einsum("bsd,dgv->bsgv", content, kernels.value)
        if self.score_position == "rotary":
            key = rotate(key, jnp.maximum(positions, 0), self.rope_theta, self.rope_scaling)
        elif self.score_position == "decoupled":
            turned = rows[:, :, None, self.d_memory :]
            turned = jnp.broadcast_to(turned, (*key.shape[:3], turned.shape[-1]))
            key = jnp.concatenate([key, turned], axis=-1)
        return key, value

    def _absorbed(self, parts: "_Parts") -> jax.Array:
        """Returns queries that meet rows, [batch, seq, heads, d_memory + d_rotary]."""
        batch, seq = parts.query.shape[:2]
        grouped = parts.query.reshape(batch, seq, self.n_kv_heads, -1, self.d_key)
        absorbed = jnp.einsum("btgrk,dgk->btgrd", grouped, parts.kernels.key)
        absorbed = absorbed.reshape(batch, seq, self.n_heads, -1)
        if parts.turned is None:
            return absorbed
        return jnp.concatenate([absorbed, parts.turned], axis=-1)

    def _attend_rows(self, absorbed, rows, slots, parts: "_Parts", sight: Sight) -> Partial:
        return attend_cache(
            absorbed,
            Cached(rows[:, None], None, self.d_memory),
            Keys(sight.query_positions, slots),
            relative_bias=parts.bias,
            scale=self._scale,
        )

    def _projected(self, found: jax.Array, kernels: Projections) -> jax.Array:
        """Returns mixtures of rows [batch, seq, heads, d_memory] as mixtures of values."""
        batch, seq = found.shape[:2]
        found = found.reshape(batch, seq, self.n_kv_heads, -1, self.d_memory)
        out = jnp.einsum("btgrd,dgv->btgrv", found, kernels.value)
        return out.reshape(batch, seq, self.n_heads, self.d_value)


class _Parts(NamedTuple):
    """What a layer attends with."""

    query: jax.Array  # [batch, n, heads, key]
    turned: jax.Array | None  # rotary part of the query, [batch, n, heads, d_rotary]
    kernels: Projections
    bias: DistanceBias | None

    @property
    def whole_query(self) -> jax.Array:
        """Both parts of the query, for keys that have both."""
        if self.turned is None:
            return self.query
        return jnp.concatenate([self.query, self.turned], axis=-1)

    def tables(self, types: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values of every id, [vocab, kv_heads, ...]."""
        assert types is not None
        return (
            jnp.einsum("vd,dgk->vgk", types, self.kernels.key),
            jnp.einsum("vd,dgk->vgk", types, self.kernels.value),
        )


def _newest_document(documents: Documents) -> jax.Array:
    """Returns the number of the document before the call's first token, int32 [batch, 1]."""
    if documents.reset is None:
        return documents.index[:, :1]
    return documents.index[:, :1] - documents.reset[:, :1]


def _merge(first: Partial, *others: Partial) -> jax.Array:
    for other in others:
        first = merge_partial_attention(first, other)
    return first.out
