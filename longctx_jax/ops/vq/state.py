"""What vector-quantised attention remembers: the last tokens, and a table of the rest.

The last `window_len` tokens stand in a ring, slot p % window_len for the token at position p, with
their codes, so that they can be filed in the table when they leave. Memory does not depend on how
long the stream is.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.vq.table import NO_DOCUMENT, Table, empty_table
from longctx_jax.typing import Array, DType, Float, Int


class VQState(NamedTuple):
    """The ring of recent tokens and the table of older ones, one row a batch entry."""

    key: jax.Array  # quantised, [batch, window, kv_heads, key]
    value: jax.Array  # [batch, window, kv_heads, value]
    codes: jax.Array  # int32 [batch, window, kv_heads]
    documents: jax.Array  # int32 [batch, window]; NO_DOCUMENT = empty slot
    table: Table  # float32 means [batch, kv_heads, codes, value], counts, document
    position: jax.Array  # int32 [batch], of the next token

    @property
    def window_len(self) -> int:
        """Tokens of the ring."""
        return self.key.shape[1]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Consecutive tokens of a stream, heads before time, time [tokens]."""

    key: jax.Array  # [batch, kv_heads, tokens, key]
    value: jax.Array  # [batch, kv_heads, tokens, value]
    codes: jax.Array  # int32 [batch, kv_heads, tokens]
    documents: jax.Array  # int32 [batch, tokens]

    def at(self, start: int, stop: int) -> "Tokens":
        """Returns tokens start .. stop-1."""
        key, value, codes = (x[:, :, start:stop] for x in (self.key, self.value, self.codes))
        return Tokens(key, value, codes, self.documents[:, start:stop])

    def pad(self, before: int, after: int) -> "Tokens":
        """Returns the tokens between empty slots."""

        def pad(x, axis, fill=0):
            widths = [(0, 0)] * x.ndim
            widths[axis] = (before, after)
            return jnp.pad(x, widths, constant_values=fill)

        key, value, codes = (pad(x, 2) for x in (self.key, self.value, self.codes))
        return Tokens(key, value, codes, pad(self.documents, 1, NO_DOCUMENT))


def init_vq_state(
    batch_size: int,
    window_len: int,
    n_kv_heads: int,
    d_key: int,
    d_value: int,
    n_codes: int,
    dtype: DType = jnp.float32,
) -> VQState:
    """Returns an empty state.

    A row takes window_len n_kv_heads (d_key + d_value) numbers of dtype, n_kv_heads n_codes
    (d_value + 1) of 4 bytes, and window_len (n_kv_heads + 1) + 2 integers.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    return VQState(
        key=jnp.zeros((batch_size, window_len, n_kv_heads, d_key), dtype),
        value=jnp.zeros((batch_size, window_len, n_kv_heads, d_value), dtype),
        codes=jnp.zeros((batch_size, window_len, n_kv_heads), jnp.int32),
        documents=jnp.full((batch_size, window_len), NO_DOCUMENT, jnp.int32),
        table=empty_table(batch_size, n_kv_heads, n_codes, d_value, wide),
        position=jnp.zeros((batch_size,), jnp.int32),
    )


def renewed(state: VQState, codebook: Float[Array, "kv_heads codes key"]) -> VQState:
    """Returns the state with the ring's keys as the codebook has them now.

    Codewords move between updates, and codes in the table stand for them as they are. A ring that
    kept the old ones, as the published code's does, would make results depend on where a call is
    cut into segments: that is when a key passes from the ring to the table. Gradients reach the
    keys as before.
    """
    now = codebook[jnp.arange(codebook.shape[0]), state.codes].astype(state.key.dtype)
    return state._replace(key=state.key + jax.lax.stop_gradient(now - state.key))


def chronological(state: VQState) -> Tokens:
    """Returns the ring's tokens from the oldest to the newest, empty slots first."""
    window = state.window_len
    slots = (state.position[:, None] + jnp.arange(window, dtype=jnp.int32)[None]) % window

    def ordered(x):
        index = slots.reshape(*slots.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=1)

    key, value, codes = (
        jnp.moveaxis(ordered(x), 2, 1) for x in (state.key, state.value, state.codes)
    )
    return Tokens(key, value, codes, ordered(state.documents))


def write(state: VQState, tokens: Tokens, table: Table, seq: int) -> VQState:
    """Returns the state `seq` tokens later.

    Args:
        state: before them.
        tokens: the last min(seq, window_len) of them.
        table: with everything filed that is no longer in the ring.
        seq: how many there were.
    """
    kept = tokens.documents.shape[1]
    positions = state.position[:, None] + jnp.arange(seq - kept, seq, dtype=jnp.int32)[None]
    slots = positions % state.window_len
    rows = jnp.arange(slots.shape[0])[:, None]

    def put(buffer, new):
        return buffer.at[rows, slots].set(new.astype(buffer.dtype), unique_indices=True)

    return VQState(
        key=put(state.key, jnp.moveaxis(tokens.key, 1, 2)),
        value=put(state.value, jnp.moveaxis(tokens.value, 1, 2)),
        codes=put(state.codes, jnp.moveaxis(tokens.codes, 1, 2)),
        documents=put(state.documents, tokens.documents),
        table=table,
        position=state.position + seq,
    )


def as_tokens(
    key: Float[Array, "batch seq kv_heads key"],
    value: Float[Array, "batch seq kv_heads value"],
    codes: Int[Array, "batch seq kv_heads"],
    documents: Int[Array, "batch seq"],
) -> Tokens:
    """Returns arrays in the layout of callers (time before heads) as `Tokens`."""
    key, value, codes = (jnp.moveaxis(x, 2, 1) for x in (key, value, codes))
    return Tokens(key, value, codes, documents)


def join(left: Tokens, right: Tokens) -> Tokens:
    """Returns the tokens of both, one after the other."""

    def join(axis, a, b):
        return jnp.concatenate([a, b.astype(a.dtype)], axis=axis)

    return Tokens(
        join(2, left.key.astype(right.key.dtype), right.key),
        join(2, left.value.astype(right.value.dtype), right.value),
        join(2, left.codes, right.codes),
        join(1, left.documents, right.documents),
    )
