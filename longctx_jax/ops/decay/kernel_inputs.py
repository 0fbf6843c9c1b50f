"""What the GPU kernels are handed beside query, key and value, and how segments are chained.

The kernels walk chunks one after another. Where batch x heads is too small to fill the device the
sequence is cut into segments that walk at the same time: first each segment's own state (it reads
key and value once more), then the states before all segments, S <- F S + A over a handful of
[key, value] matrices in plain JAX, then the kernel proper with those as initial states.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.decay.chunks import end_factors, make_pieces
from longctx_jax.ops.decay.powers import log_sums

LOG2_E = 1.4426950408889634
NO_MEMORY = -200.0  # nats: exp of it is 0 in float32, and -inf * 0 never appears
N_MULTIPROCESSORS = 132  # of an H100 or H200; only balances segments
MAX_SEGMENTS = 16
# log2 of the decay of a token that starts a document: 0 in float32, and on the grid of `log_sums`,
# so that differences between tokens of one document stay as exact as without resets.
RESET = -160.0


class DecayInputs(NamedTuple):
    """Decays as the kernels read them; None where there are none.

    Attributes:
        per_step: log2 of a constant decay, float32 [heads]; or None.
        coarse: log2 sums within each chunk, float32 [batch, heads, padded]; or None.
        fine: what `coarse` leaves out (see `powers.log_sums`); None where it is added to coarse.
    """

    per_step: jax.Array | None
    coarse: jax.Array | None
    fine: jax.Array | None


def segment_count(n_blocks: int, n_chunks: int) -> int:
    """Returns how many segments fill the device, if one needs n_blocks blocks of the grid.

    Two blocks a multiprocessor, and at least four chunks a segment.
    """
    if n_blocks >= N_MULTIPROCESSORS:
        return 1
    return max(1, min(MAX_SEGMENTS, 2 * N_MULTIPROCESSORS // n_blocks, n_chunks // 4))


def decay_inputs(
    log_decay: jax.Array, reset: jax.Array | None, seq: int, chunk_len: int, *, is_exact: bool
) -> DecayInputs:
    """Returns the kernels' view of the decay; sums restart in every chunk, padding adds nothing.

    A reset becomes one more decay of its token, which then differs from token to token.

    Args:
        log_decay: float32 [heads], or finite [batch, seq, heads].
        reset: bool [batch, seq, heads or 1] or None.
        seq: tokens.
        chunk_len: tokens a chunk.
        is_exact: keep the fine part of the sums apart: for products in full float32.
    """
    logs = LOG2_E * jnp.maximum(log_decay, NO_MEMORY)
    if reset is None and log_decay.ndim == 1:
        return DecayInputs(logs, None, None)
    if reset is not None:
        logs = jnp.where(reset, RESET, logs)
    logs = jnp.moveaxis(jnp.pad(logs, [(0, 0), (0, -seq % chunk_len), (0, 0)]), 1, 2)
    sums = log_sums(logs.reshape(*logs.shape[:2], -1, chunk_len))
    if is_exact:
        return DecayInputs(None, *(part.reshape(logs.shape) for part in sums))
    return DecayInputs(None, (sums.coarse + sums.fine).reshape(logs.shape), None)


def states_before_segments(
    added: jax.Array,
    state: jax.Array | None,
    log_decay: jax.Array,
    reset: jax.Array | None,
    seq: int,
    segment_len: int,
    *,
    is_backwards: bool,
) -> jax.Array:
    """Returns the state each segment starts from, float32 [batch, heads, segments, key, value].

    Args:
        added: each segment's own state, of all but the one that is walked last:
            [batch, heads, segments - 1, key, value], in the order of time.
        state: what the first segment walked starts from, None = zeros.
        log_decay: as in `decay_inputs`.
        reset: as in `decay_inputs`.
        seq: tokens.
        segment_len: tokens a segment; the last one may have fewer.
        is_backwards: segments are walked from the last to the first.
    """
    pieces = make_pieces(log_decay, reset, seq, segment_len)
    n_segments = -(-seq // segment_len)
    _, _, forget = end_factors(log_decay, pieces, segment_len)
    forget = jnp.broadcast_to(forget, (added.shape[0], n_segments, added.shape[1]))
    order = range(n_segments)[::-1] if is_backwards else range(n_segments)
    before = jnp.zeros_like(added[:, :, 0]) if state is None else state.astype(added.dtype)
    states = {}
    for segment in order:
        states[segment] = before
        if len(states) < n_segments:
            own = added[:, :, segment - 1 if is_backwards else segment]
            before = forget[:, segment, :, None, None] * before + own
    return jnp.stack([states[segment] for segment in range(n_segments)], axis=2)


def pad_width(x: jax.Array, width: int) -> jax.Array:
    """Returns x with zeros after its last axis, up to width."""
    missing = width - x.shape[-1]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def pad_state(state: jax.Array | None, d_key: int, d_value: int) -> jax.Array | None:
    """Returns a state [..., key, value] with zeros up to the given widths."""
    if state is None:
        return None
    pad = [(0, 0)] * (state.ndim - 2)
    pad += [(0, d_key - state.shape[-2]), (0, d_value - state.shape[-1])]
    return jnp.pad(state, pad)
