"""The search for the nearest codeword as one Triton kernel, without a matrix of distances.

    z = argmin_s |x - C_s|^2 = argmin_s |C_s|^2 - 2 x . C_s

A program owns a tile of vectors, walks the tiles of codes and keeps, in every lane, the least
distance it met and the tile it met it in; two reductions at the end find the least and, among
equals, the lowest code. Assignments must not depend on the matrix unit: plain TF32 changes them. So
float32 vectors are multiplied in three TF32 products (relative error 2^-21 or so), and bfloat16
ones, exact as they are, with a codebook split into three bfloat16 pieces that add up to it.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from longctx_jax.ops.triton_kernels import quietly
from longctx_jax.ops.vq.pallas_triton_tiles import MIN_WIDTH, load, pad_columns, store
from longctx_jax.typing import Array, Float, Int

N_PIECES = 3  # bfloat16 numbers that add up to a float32: 3 times 8 bits


@dataclasses.dataclass(frozen=True)
class SearchTiling:
    """How the search is cut up.

    Attributes:
        rows: vectors a tile.
        codes: codes a tile.
        n_warps: warps a program.
        n_stages: depth of the software pipeline of its loads.
    """

    rows: int
    codes: int
    n_warps: int
    n_stages: int


# Without a spill at every width it takes (results/vq_h200_registers.jsonl).
TILING = SearchTiling(64, 32, 4, 2)


def search_codes(
    vectors: Float[Array, "*batch heads key"],
    codebook: Float[Array, "heads codes key"],
    *,
    interpret: bool = False,
) -> Int[Array, "*batch heads"]:
    """Returns argmin_s |vector - codebook_s|^2, the lowest among equals.

    As `codebook.search_codes`. Cost: see `search_codes_and_errors`.
    """
    return search_codes_and_errors(vectors, codebook, interpret=interpret)[0]


def search_codes_and_errors(
    vectors: Float[Array, "*batch heads key"],
    codebook: Float[Array, "heads codes key"],
    *,
    interpret: bool = False,
    tiles: SearchTiling = TILING,
) -> tuple[Int[Array, "*batch heads"], Float[Array, "*batch heads"]]:
    """Returns the nearest codes and the squared distances to them, float32, without gradients.

    The distance is |x|^2 + min (|C|^2 - 2 x . C): absolute error about 1e-6 |x|^2.

    Cost: 2 vectors heads codes key flops, three times over; reads key items and writes 8 bytes a
    vector; the codebook is read once a tile of vectors from the second-level cache.
    """
    *batch, heads, d_key = vectors.shape
    n_vectors = math.prod(batch)
    width = max(MIN_WIDTH, pl.next_power_of_2(d_key))
    codebook = codebook.astype(jnp.float32)
    norms = jnp.sum(codebook**2, axis=-1)
    is_narrow = vectors.dtype == jnp.bfloat16
    if not is_narrow:
        vectors = vectors.astype(jnp.float32)
    pieces = split(codebook) if is_narrow else [codebook]
    pieces = [pad_columns(piece, width) for piece in pieces]
    flat = pad_columns(vectors, width).reshape(n_vectors, heads, width)

    def whole(array):
        return pl.BlockSpec(
            (None, *array.shape[1:]), lambda row, head: (head, *[0] * (array.ndim - 1))
        )

    out = pl.BlockSpec((n_vectors, None), lambda row, head: (0, head))
    run = pl.pallas_call(
        functools.partial(_kernel, tiles=tiles, is_exact=interpret),
        grid=(pl.cdiv(n_vectors, tiles.rows), heads),
        in_specs=[
            pl.BlockSpec((n_vectors, None, width), lambda row, head: (0, head, 0)),
            whole(norms),
            *(whole(piece) for piece in pieces),
        ],
        out_specs=[out, out],
        out_shape=[
            jax.ShapeDtypeStruct((n_vectors, heads), jnp.int32),
            jax.ShapeDtypeStruct((n_vectors, heads), jnp.float32),
        ],
        compiler_params=plt.CompilerParams(num_warps=tiles.n_warps, num_stages=tiles.n_stages),
        interpret=interpret,
        name="vq_search_codes",
    )
    codes, errors = quietly(run, flat, norms, *pieces)
    return codes.reshape(*batch, heads), errors.reshape(*batch, heads)


def split(x: jax.Array) -> list[jax.Array]:
    """Returns bfloat16 arrays that add up to float32 x, the largest first."""
    pieces = []
    for _ in range(N_PIECES):
        # A rounding that no simplifier may drop, unlike a cast there and back.
        piece = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        pieces.append(piece.astype(jnp.bfloat16))
        x = x - piece
    return pieces


def _kernel(x_ref, norm_ref, *refs, tiles: SearchTiling, is_exact: bool):
    *piece_refs, code_ref, error_ref = refs
    n_vectors, n_codes = x_ref.shape[0], norm_ref.shape[0]
    row_limit = n_vectors if n_vectors % tiles.rows else None
    code_limit = n_codes if n_codes % tiles.codes else None
    start = pl.program_id(0) * tiles.rows
    x = load(x_ref, (), start, tiles.rows, row_limit, slice(None))
    precision = None
    if x.dtype == jnp.float32:
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = jax.lax.Precision.HIGHEST if is_exact else precision

    def visit(i, best):
        distance, tile = best
        at = i * tiles.codes
        product = jnp.zeros(distance.shape, jnp.float32)
        for ref in reversed(piece_refs):  # the smallest first
            word = load(ref, (), at, tiles.codes, code_limit, slice(None))
            product += plt.dot(x, word, trans_b=True, precision=precision)
        norm = load(norm_ref, (), at, tiles.codes, code_limit, other=jnp.inf)
        new = norm[None, :] - 2.0 * product
        is_nearer = new < distance  # the earlier tile, so the lower code, keeps a tie
        return jnp.where(is_nearer, new, distance), jnp.where(is_nearer, i, tile)

    shape = (tiles.rows, tiles.codes)
    # A lane that meets no number, as with NaN, says tile 0: always a code.
    best = jnp.full(shape, jnp.inf, jnp.float32), jnp.zeros(shape, jnp.int32)
    distance, tile = jax.lax.fori_loop(0, pl.cdiv(n_codes, tiles.codes), visit, best)
    least = jnp.min(distance, axis=1)
    code = tile * tiles.codes + jnp.arange(tiles.codes)[None, :]
    code = jnp.min(jnp.where(distance == least[:, None], code, n_codes - 1), axis=1)
    wide = x.astype(jnp.float32)
    error = jnp.maximum(least + jnp.sum(wide * wide, axis=1), 0.0)
    store(code_ref, (), start, jnp.minimum(code, n_codes - 1), row_limit)
    store(error_ref, (), start, error, row_limit)
