"""What a model remembers whose layers all attend to the initial embeddings: one memory for all.

Three forms of the same memory: the normed embeddings themselves, the token ids they are made of, or
how often each token id has occurred. Rings as in `kv_cache.py`, slot p % capacity for the token at
position p; which position a slot holds follows from the stream's, and only the newest document can
be seen again, so a slot has no marks of its own: a byte costs a byte.
"""

import flax.struct
import jax
import jax.numpy as jnp

from longctx_jax.nn.contract import Documents
from longctx_jax.nn.kv_cache import KVCache
from longctx_jax.ops.attention import NEVER


@flax.struct.dataclass
class Place:
    """Where a stream stands, one row a batch entry."""

    position: jax.Array  # int32 [batch], of the next token
    start: jax.Array  # int32 [batch], position of the first token of the newest document


@flax.struct.dataclass
class KeyMemory:
    """Keys and values, of all layers alike; or none here, where every layer keeps its own."""

    keys: KVCache | None
    place: Place


@flax.struct.dataclass
class RowRing:
    """The last rows of the memory."""

    rows: jax.Array  # [batch, capacity, width]
    place: Place


@flax.struct.dataclass
class IdRing:
    """The last token ids."""

    ids: jax.Array  # unsigned, as few bytes as the vocabulary needs; [batch, capacity]
    place: Place


@flax.struct.dataclass
class Counts:
    """The last token ids, and how often each id has occurred before them in the document.

    With slopes, a token that is d tokens older than the newest counts exp(-slope d).
    """

    ids: jax.Array | None  # as in IdRing; None where positions do not matter or fade
    counts: jax.Array  # int32 [batch, 1, vocab]; with slopes float32 [batch, heads, vocab]
    place: Place


Memory = KeyMemory | RowRing | IdRing | Counts


def id_dtype(vocab_size: int) -> str:
    """Returns the smallest unsigned type that holds every id."""
    return next(
        t for t, n in (("uint8", 2**8), ("uint16", 2**16), ("uint32", 2**32)) if vocab_size <= n
    )


def init_place(batch_size: int) -> Place:
    """Returns the place before the first token."""
    return Place(jnp.zeros((batch_size,), jnp.int32), jnp.zeros((batch_size,), jnp.int32))


def walk(place: Place, documents: Documents, seq: int) -> tuple[jax.Array, jax.Array, Place]:
    """Returns positions and their documents' starts, int32 [batch, seq], and the place after."""
    positions = place.position[:, None] + jnp.arange(seq, dtype=jnp.int32)[None]
    starts = jnp.broadcast_to(place.start[:, None], positions.shape)
    if documents.reset is not None:
        own = jnp.where(documents.reset, positions, starts)
        starts = jax.lax.cummax(own, axis=1)
    return positions, starts, Place(place.position + seq, starts[:, -1])


def slot_positions(place: Place, capacity: int) -> jax.Array:
    """Returns the position of each slot's token, int32 [batch, capacity].

    NEVER for a slot that is empty or holds a token of an older document.
    """
    last = place.position[:, None] - 1
    age = (last - jnp.arange(capacity, dtype=jnp.int32)[None]) % capacity
    positions = last - age
    return jnp.where(positions >= place.start[:, None], positions, NEVER)


def write(ring: jax.Array, new: jax.Array, place: Place) -> jax.Array:
    """Returns the ring [batch, capacity, ...] with new tokens [batch, seq, ...] from place on."""
    batch, seq = new.shape[:2]
    capacity = ring.shape[1]
    kept = min(seq, capacity)
    positions = place.position[:, None] + jnp.arange(seq - kept, seq, dtype=jnp.int32)[None]
    rows = jnp.arange(batch)[:, None]
    new = new[:, seq - kept :].astype(ring.dtype)
    return ring.at[rows, positions % capacity].set(new, unique_indices=True)


def extend_rows(ring: RowRing, rows: jax.Array, after: Place) -> RowRing:
    """Returns the ring after it takes in rows [batch, seq, width]."""
    return RowRing(write(ring.rows, rows, ring.place), after)


def extend_ids(ring: IdRing, ids: jax.Array, after: Place) -> IdRing:
    """Returns the ring after it takes in ids [batch, seq]."""
    return IdRing(write(ring.ids, ids, ring.place), after)


def extend_counts(memory: Counts, ids: jax.Array, after: Place, slopes: jax.Array | None) -> Counts:
    """Returns the memory after it takes in ids [batch, seq]: what leaves the ring is counted.

    Args:
        memory: before them.
        ids: of the new tokens.
        after: the place after them.
        slopes: [heads], of the decay of counts, which needs a memory without ids; None = no decay.
    """
    seq, window = ids.shape[1], 0 if memory.ids is None else memory.ids.shape[1]
    before, leaving = memory.place, ids.astype(jnp.int32)
    if memory.ids is not None:  # from its oldest token on, then the new ones: the first seq leave
        order = (before.position[:, None] + jnp.arange(window, dtype=jnp.int32)) % window
        old = jnp.take_along_axis(memory.ids, order, axis=1).astype(jnp.int32)
        leaving = jnp.concatenate([old, leaving], axis=1)[:, :seq]
    positions = before.position[:, None] - window + jnp.arange(seq, dtype=jnp.int32)
    weights = (positions >= after.start[:, None]).astype(memory.counts.dtype)[:, None]
    kept = (after.start == before.start).astype(memory.counts.dtype)[:, None, None]
    if slopes is not None:
        age = (after.position[:, None] - 1 - positions)[:, None].astype(memory.counts.dtype)
        weights = weights * jnp.exp(-slopes[:, None] * age)
        kept = kept * jnp.exp(-slopes * seq)[:, None]
    n_batch, n_rows, _ = memory.counts.shape
    place = jnp.arange(n_batch)[:, None, None], jnp.arange(n_rows)[:, None], leaving[:, None]
    counts = (memory.counts * kept).at[place].add(weights.astype(memory.counts.dtype))
    ring = None if memory.ids is None else write(memory.ids, ids, before)
    return Counts(ring, counts, after)
