"""The sequence cut into chunks, and the four decay factors of a chunk.

For a chunk of c tokens with local index i, log decays summed from its first token (G_i), and the
state S before it:

    M_ij = exp(G_i - G_j), i >= j    a_i = exp(G_i)  (read S)
    b_i  = exp(G_{c-1} - G_i)  (write into S)        f = exp(G_{c-1})  (forget S)

so that O = scale [ ((Q K^T) o M) V + a . (Q S) ] and S' = f S + (b . K)^T V. With one constant
decay a head G_i = (i + 1) log_decay. Running backwards in time (gradients) swaps a with b and
transposes M. A document border between two tokens makes their factor 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.ops.decay.powers import LogSums, decay_power, document_index, log_sums


class Factors(NamedTuple):
    """M without its leading batch axes where it has none; [..., heads, c, c], a and b, and f."""

    decay: jax.Array  # [..., heads, c, c]
    read: jax.Array  # [..., heads, c]
    write: jax.Array  # [..., heads, c]
    forget: jax.Array  # [..., heads]


class Pieces(NamedTuple):
    """What the factors are made of; [batch, n_chunks, ...], or without n_chunks inside a scan."""

    length: jax.Array  # tokens in the chunk, int32 [n_chunks]
    sums: LogSums | None  # G within the chunk [..., heads, c]; None = constant decay
    document: jax.Array | None  # [..., heads or 1, c]
    document_before: jax.Array | None  # of the last token before the chunk [..., heads or 1]


def split(x: jax.Array, chunk_len: int) -> jax.Array:
    """Returns [batch, seq, ...] as [batch, n_chunks, chunk_len, ...], zeros at the end."""
    batch, seq = x.shape[:2]
    n_chunks = -(-seq // chunk_len)
    pad = [(0, 0), (0, n_chunks * chunk_len - seq)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad).reshape(batch, n_chunks, chunk_len, *x.shape[2:])


def join(x: jax.Array, seq: int) -> jax.Array:
    """Returns [batch, n_chunks, chunk_len, ...] as [batch, seq, ...]: undoes `split`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :seq]


def make_pieces(log_decay: jax.Array, reset: jax.Array | None, seq: int, chunk_len: int) -> Pieces:
    """Returns the pieces of every chunk; padding neither decays nor starts a document.

    Args:
        log_decay: [heads], or finite [batch, seq, heads].
        reset: bool [batch, seq, heads or 1].
        seq: tokens of the sequence.
        chunk_len: tokens a chunk.
    """
    n_chunks = -(-seq // chunk_len)
    length = np.minimum(chunk_len, seq - chunk_len * np.arange(n_chunks))
    sums = document = before = None
    if log_decay.ndim == 3:
        sums = log_sums(jnp.moveaxis(split(log_decay, chunk_len), 2, 3))
    if reset is not None:
        index = document_index(reset)
        index = jnp.pad(index, [(0, 0), (0, n_chunks * chunk_len - seq), (0, 0)], mode="edge")
        document = jnp.moveaxis(split(index, chunk_len), 2, 3)
        before = jnp.pad(document[:, :-1, :, -1], [(0, 0), (1, 0), (0, 0)])
    return Pieces(jnp.asarray(length, jnp.int32), sums, document, before)


def chunk_factors(log_decay: jax.Array, pieces: Pieces, chunk_len: int) -> Factors:
    """Returns the factors, forwards in time, of all chunks or of one inside a scan."""
    time = jnp.arange(chunk_len)
    if pieces.sums is None:
        decay = decay_power(log_decay, time[:, None] - time[None, :])
    else:
        sums = pieces.sums
        is_past = time[:, None] >= time[None, :]
        difference = sums.at(..., slice(None), None) - sums.at(..., None, slice(None))
        decay = jnp.where(is_past, jnp.exp(jnp.where(is_past, difference, 0.0)), 0.0)
    if pieces.document is not None:
        is_same = pieces.document[..., :, None] == pieces.document[..., None, :]
        decay = jnp.where(is_same, decay, 0)
    return Factors(decay, *end_factors(log_decay, pieces, chunk_len))


def end_factors(
    log_decay: jax.Array, pieces: Pieces, chunk_len: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns read, write and forget alone: nothing quadratic in the chunk."""
    time = jnp.arange(chunk_len)
    if pieces.sums is None:
        length = pieces.length[..., None]
        read = decay_power(log_decay, time + 1)
        left = length - 1 - time.reshape(*[1] * (length.ndim - 1), -1)
        write = jnp.moveaxis(decay_power(log_decay, left), 0, -2)
        forget = jnp.moveaxis(decay_power(log_decay, pieces.length), 0, -1)
    else:
        sums = pieces.sums
        read = jnp.exp(sums.coarse + sums.fine)
        write = jnp.exp(sums.at(..., slice(-1, None)) - sums)
        forget = read[..., -1]
    if pieces.document is not None:
        document, before = pieces.document, pieces.document_before
        assert before is not None
        read = jnp.where(document == before[..., None], read, 0)
        write = jnp.where(document == document[..., -1:], write, 0)
        forget = jnp.where(document[..., -1] == before, forget, 0)
    return read, write, forget


def backwards(factors: Factors) -> Factors:
    """Returns the factors of the same chunk run from its last token to its first."""
    return Factors(jnp.swapaxes(factors.decay, -1, -2), factors.write, factors.read, factors.forget)


def over_chunks(pieces: Pieces) -> Pieces:
    """Returns the pieces with the chunk axis in front, as `lax.scan` wants them."""
    rest = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), pieces._replace(length=None))
    return rest._replace(length=pieces.length)
