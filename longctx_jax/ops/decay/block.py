"""The block-based form: one block after another, with one tile of scores alive at a time.

The loop of LeetDecoding's block-based method (Wang et al. 2025, arXiv 2501.02573): the products
of a block and the update of the state lie in one step of a scan, which is rematerialised in the
backward pass, so that memory is the states between blocks and nothing quadratic.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.ops import products
from longctx_jax.ops.decay.chunks import (
    Pieces,
    backwards,
    chunk_factors,
    join,
    make_pieces,
    over_chunks,
    split,
)
from longctx_jax.ops.decay.powers import initial_state
from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Bool, DType, Float

BLOCK_LEN = 64  # tokens


def decay_attention_block(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq #heads"] | None = None,
    scale: float,
    chunk_len: int = BLOCK_LEN,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`; chunk_len is the block.

    Cost: 2 batch heads seq (chunk_len (key + value) + 2 key value) flops; seq / chunk_len
    sequential steps; the backward pass keeps key value / chunk_len numbers a token and head.
    """
    walk = functools.partial(walk_blocks, chunk_len=chunk_len, remat=True)
    return walk(query, key, value, log_decay, state, reset=reset, scale=scale)


def walk_blocks(
    x: jax.Array,
    y: jax.Array,
    z: jax.Array,
    log_decay: jax.Array,
    state: jax.Array | None,
    *,
    reset: jax.Array | None,
    scale: float,
    chunk_len: int,
    is_backwards: bool = False,
    out_dtype: DType | None = None,
    remat: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns sum_j M_ij (x_i . y_j) z_j and the last state, over j <= i or, backwards, j >= i.

    Forwards `scale` multiplies the output, backwards what enters the state: see `linear_vjp.py`.
    """
    dtype = accumulator(x, z)
    seq = x.shape[1]
    chunk = min(chunk_len, seq)
    pieces = make_pieces(log_decay, reset, seq, chunk)
    scale_out, scale_in = (1.0, scale) if is_backwards else (scale, 1.0)

    product = functools.partial(products.product, dtype=dtype)

    def per_token(factor):  # [..., heads, chunk] -> [..., chunk, heads, 1]
        return jnp.swapaxes(factor, -1, -2)[..., None]

    def advance(state, tokens: tuple[jax.Array, jax.Array, jax.Array, Pieces]):
        x, y, z, pieces = tokens
        factors = chunk_factors(log_decay, pieces, chunk)
        factors = backwards(factors) if is_backwards else factors
        scores = (product("bthk,bshk->bhts", x, y) * (scale * factors.decay)).astype(z.dtype)
        out = product("bhts,bshv->bthv", scores, z)
        read = scale_out * per_token(factors.read)
        out += read * product("bthk,bhkv->bthv", x, state.astype(x.dtype))
        written = (y * (scale_in * per_token(factors.write))).astype(y.dtype)
        added = product("bshk,bshv->bhkv", written, z)
        return factors.forget[..., None, None] * state + added, out.astype(out_dtype or z.dtype)

    tokens: Any = (*(jnp.moveaxis(split(a, chunk), 1, 0) for a in (x, y, z)), over_chunks(pieces))
    state, out = jax.lax.scan(
        jax.checkpoint(advance) if remat else advance,
        initial_state(x, z, state),
        tokens,
        reverse=is_backwards,
    )
    return join(jnp.moveaxis(out, 0, 1), seq), state
