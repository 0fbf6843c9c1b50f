"""How attention to embeddings is computed: among the tokens of a call, and from each cache.

Keys and values are made of the rows, or the query absorbs their projections and meets the rows
themselves: <q, m W_K> = <q W_K^T, m>,  (P m) W_V = P (m W_V). All forms give one result.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.nn.contract import Documents, own_documents
from longctx_jax.nn.inattention.memory import Counts, IdRing, RowRing, slot_positions
from longctx_jax.nn.kv_cache import KVCache, attend_ring, cached_attention, extend
from longctx_jax.ops.attention import (
    NEVER,
    Keys,
    Partial,
    attention_partial,
    empty_partial,
    merge_partial_attention,
)
from longctx_jax.ops.cache_attention import Cached, attend_cache, without_kernels
from longctx_jax.ops.position import DistanceBias, rotate
from longctx_jax.ops.vocabulary import attend_counts, attend_ids
from longctx_jax.ops.vq import VQState, vq_attention
from longctx_jax.ops.vq.table import NO_DOCUMENT, Table

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


def project(spec: Any, kernels: Projections, rows: jax.Array, positions: jax.Array):
    """Returns keys and values [batch, rows, kv_heads, ...] of rows at these positions.

    Args:
        spec: the layer, for its widths and positions.
        kernels: of the layer, or of all.
        rows: [batch, rows, d_memory + d_rotary].
        positions: int32 [batch or 1, rows].
    """
    content = rows[..., : spec.d_memory]
    key = jnp.einsum("bsd,dgk->bsgk", content, kernels.key)
    value = jnp.einsum("bsd,dgv->bsgv", content, kernels.value)
    if spec.score_position == "rotary":
        key = rotate(key, jnp.maximum(positions, 0), spec.rope_theta, spec.rope_scaling)
    elif spec.score_position == "decoupled":
        turned = rows[:, :, None, spec.d_memory :]
        turned = jnp.broadcast_to(turned, (*key.shape[:3], turned.shape[-1]))
        key = jnp.concatenate([key, turned], axis=-1)
    return key, value


class Reader(NamedTuple):
    """What a layer attends with, and how it attends to each kind of memory."""

    spec: Any  # the layer, for its widths, positions and implementation
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

    @property
    def _scale(self) -> float:
        turned = self.spec.d_rotary if self.spec.score_position == "decoupled" else 0
        return (self.spec.d_key + turned) ** -0.5

    @property
    def _own_form(self) -> str:
        """The implementation of attention among the tokens of a call."""
        return "auto" if self.spec.implementation == "vq" else self.spec.implementation

    def alone(self, sight: Sight, documents: Documents | None) -> jax.Array:
        """Nothing came before: the tokens of the call, or some of them, attend to its rows."""
        key, value = project(self.spec, self.kernels, sight.rows, sight.positions)
        segments = own_documents(documents)
        where = Keys(sight.query_positions, sight.positions, sight.query_documents, segments)
        return attention_partial(
            self.whole_query,
            key,
            value,
            where,
            is_aligned=sight.query_positions is sight.positions,
            needs_normalizer=False,
            relative_bias=self.bias,
            implementation=self._own_form,
        ).out

    def from_keys(self, sight: Sight, documents):
        """A cache of keys and values: of the layer, or (shared projections) of all layers."""
        own = sight.layer_cache
        key, value = project(self.spec, self.kernels, sight.rows, sight.positions)
        if self.query.shape[1] > 1 or (own is not None and key.shape[1] == 1):
            past = sight.before.keys if own is None else own
            out, kept = cached_attention(
                self.whole_query,
                key,
                value,
                past,
                documents,
                window_len=0,
                relative_bias=self.bias,
                implementation=self._own_form,
            )
            return out, None if own is None else kept
        kept = None if own is None else extend(own, key, value, documents.index)
        ring = sight.after.keys if kept is None else kept
        at = sight.query_positions
        out = attend_ring(self.whole_query, ring, at, documents.index[:, -1:], self.bias).out
        return out, kept

    def from_window(self, sight: Sight, documents, train: bool) -> jax.Array:
        """Several tokens attend to themselves and to what a memory of all layers holds."""
        if self._is_quantized(sight, train):
            return self._quantized(sight, documents)
        key, value = project(self.spec, self.kernels, sight.rows, sight.positions)
        past, query = sight.before, self.whole_query
        options = {"relative_bias": self.bias, "implementation": self._own_form}
        if not isinstance(past, Counts):
            old = self._ring_of_keys(past, self.kernels, sight, documents)
            return cached_attention(query, key, value, old, documents, window_len=0, **options)[0]
        segments = own_documents(documents)
        where = Keys(sight.query_positions, sight.positions, segments, segments)
        own = attention_partial(query, key, value, where, is_aligned=True, **options)
        tables = self.tables(sight.types)
        near, far = self._of_counts(past, self.query, tables, sight)
        return _merge(own, near, far)

    def _is_quantized(self, sight: Sight, train: bool) -> bool:
        """Whether to attend as if ids were codes; old keys would get no gradients in training."""
        return self.spec.implementation == "vq" and isinstance(sight.before, Counts) and not train

    def _quantized(self, sight: Sight, documents: Documents) -> jax.Array:
        """Transformer-VQ's attention with the tables by id as codebook: nothing is rounded."""
        past, window = sight.before, self.spec.n_exact
        key_table, value_table = self.tables(sight.types)
        slots = slot_positions(past.place, window)
        marks = jnp.broadcast_to(_newest_document(documents), slots.shape)

        def by_head(ids):
            ids = ids.astype(jnp.int32)[..., None]
            return jnp.broadcast_to(ids, (*ids.shape[:2], self.spec.n_kv_heads))

        values = jnp.moveaxis(value_table, 0, 1)[None]
        counts = jnp.broadcast_to(past.counts, (len(slots), self.spec.n_kv_heads, len(key_table)))
        table = Table(
            jnp.broadcast_to(values, (*counts.shape, self.spec.d_value)).astype(
                jnp.promote_types(self.spec.dtype, jnp.float32)
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
        assert self.bias is not None and self.bias.table is not None
        bias = jnp.broadcast_to(
            self.bias.table.astype(self.query.dtype),
            (*self.query.shape[:2], *self.bias.table.shape),
        )
        return vq_attention(
            self.query,
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
        key, value = project(self.spec, kernels, rows, slots)
        marks = jnp.broadcast_to(_newest_document(documents), slots.shape)
        key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)
        return KVCache(key, value, slots, marks, past.place.position)

    def from_rows(self, sight: Sight) -> jax.Array:
        """One token against the rows: <q, m W_K> = <q W_K^T, m>, (P m) W_V = P (m W_V)."""
        ring = sight.after
        slots = slot_positions(ring.place, ring.rows.shape[1])
        found = self._attend_rows(self._absorbed(), ring.rows, slots, sight)
        return self._projected(found.out, self.kernels)

    def from_ids(self, sight: Sight) -> jax.Array:
        """One token against ids: through tables by id, or tile by tile with rows made anew."""
        ring = sight.after
        capacity = ring.ids.shape[1]
        slots = slot_positions(ring.place, capacity)
        if sight.types is not None:
            where = Keys(sight.query_positions, slots)
            options = {"relative_bias": self.bias, "scale": self._scale}
            types, ids = sight.types[:, None], ring.ids.astype(jnp.int32)
            found = attend_ids(self._absorbed(), types, types, ids, where, **options)
            return self._projected(found.out, self.kernels)
        tile = min(TILE_LEN, capacity)
        padding = [(0, 0), (0, -capacity % tile)]
        tiles = (jnp.pad(ring.ids, padding), jnp.pad(slots, padding, constant_values=NEVER))
        tiles = tuple(jnp.moveaxis(x.reshape(x.shape[0], -1, tile), 1, 0) for x in tiles)
        absorbed = self._absorbed()

        def add_tile(total, inputs):
            ids, slots = inputs
            assert sight.make_rows is not None
            rows = sight.make_rows(ids, slots, ring.place.start)
            found = self._attend_rows(absorbed, rows, slots, sight)
            wide = Partial(found.out.astype(total.out.dtype), found.log_normalizer)
            return merge_partial_attention(total, wide), None

        shape = (*absorbed.shape[:3], self.spec.d_memory)
        wide = jnp.promote_types(self.spec.dtype, jnp.float32)
        start = Partial(jnp.zeros(shape, wide), jnp.full(shape[:3], -jnp.inf, wide))
        found, _ = jax.lax.scan(add_tile, start, tiles)
        return self._projected(found.out.astype(self.spec.dtype), self.kernels)

    def from_counts(self, sight: Sight) -> jax.Array:
        """One token against the newest ids, and all others as a histogram."""
        assert sight.types is not None
        types = sight.types[:, None]  # one head of rows, which the query absorbs the projections of
        near, far = self._of_counts(sight.after, self._absorbed(), (types, types), sight)
        return self._projected(_merge(near, far), self.kernels)

    def _of_counts(self, memory: Counts, query: jax.Array, tables, sight: Sight) -> list[Partial]:
        """Attention to the ring of ids and to the histogram, as they stand in `memory`.

        Args:
            memory: before or after the tokens of the call.
            query: that meets the tables.
            tables: keys and values by id, [vocab, heads of them, ...].
            sight: where the queries stand.
        """
        key_table, value_table = tables
        place = memory.place
        reference = place.position[:, None] - 1  # that counts are as old as
        is_seen = sight.query_starts == place.start[:, None]
        offset = jnp.where(is_seen, 0.0, -jnp.inf)[:, None]
        if self.bias is not None and self.bias.slopes is not None:
            slopes = self.bias.slopes
            age = (sight.query_positions - reference)[:, None].astype(slopes.dtype)
            offset = offset - slopes[:, None] * age
        counts = memory.counts.astype(jnp.promote_types(self.spec.dtype, jnp.float32))
        far = attend_counts(query, key_table, value_table, counts, offset, scale=self._scale)
        if memory.ids is None:
            return [empty_partial(far), far]
        slots = slot_positions(place, memory.ids.shape[1])
        marks = jnp.broadcast_to(place.start[:, None], slots.shape)
        where = Keys(sight.query_positions, slots, sight.query_starts, marks)
        near = attention_partial(
            query, key_table[memory.ids], value_table[memory.ids], where,
            relative_bias=self.bias, scale=self._scale,
        )  # fmt: skip
        return [near, far]

    def _absorbed(
        self,
    ) -> jax.Array:
        """Returns queries that meet rows, [batch, seq, heads, d_memory + d_rotary]."""
        batch, seq = self.query.shape[:2]
        grouped = self.query.reshape(batch, seq, self.spec.n_kv_heads, -1, self.spec.d_key)
        absorbed = jnp.einsum("btgrk,dgk->btgrd", grouped, self.kernels.key)
        absorbed = absorbed.reshape(batch, seq, self.spec.n_heads, -1)
        if self.turned is None:
            return absorbed
        return jnp.concatenate([absorbed, self.turned], axis=-1)

    def _attend_rows(self, absorbed, rows, slots, sight: Sight) -> Partial:
        return attend_cache(
            absorbed,
            Cached(rows[:, None], None, self.spec.d_memory),
            Keys(sight.query_positions, slots),
            relative_bias=self.bias,
            scale=self._scale,
            implementation=without_kernels(self.spec.implementation),
        )

    def _projected(self, found: jax.Array, kernels: Projections) -> jax.Array:
        """Returns mixtures of rows [batch, seq, heads, d_memory] as mixtures of values."""
        batch, seq = found.shape[:2]
        found = found.reshape(batch, seq, self.spec.n_kv_heads, -1, self.spec.d_memory)
        out = jnp.einsum("btgrd,dgv->btgrv", found, kernels.value)
        return out.reshape(batch, seq, self.spec.n_heads, self.spec.d_value)


def _newest_document(documents: Documents) -> jax.Array:
    """Returns the number of the document before the call's first token, int32 [batch, 1]."""
    if documents.reset is None:
        return documents.index[:, :1]
    return documents.index[:, :1] - documents.reset[:, :1].astype(jnp.int32)


def _merge(first: Partial, *others: Partial) -> jax.Array:
    for other in others:
        first = merge_partial_attention(first, other)
    return first.out
