"""One chunk of the walk of `pallas_mosaic_gpu.py`: its products, its decays, its tiles.

Nothing imports this file but that one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK_LEN = 64  # tokens: the rows of one wgmma
TILE = 64  # value columns a block owns; every width is padded to a multiple of it
IS_NEW = jax.__version_info__ >= (0, 11)  # the API changed from 0.10 to 0.11


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static about one launch; sizes are the padded ones.

    Attributes:
        n_chunks: of the whole sequence.
        chunks_per_segment: the last segment may have fewer.
        n_segments: segments that are walked at the same time.
        n_warpgroups: that compute, in one block; each has its own tile of value columns.
        states_only: only the segments' own states are wanted, of all but the last one walked.
        is_interpreted: the kernel must do without what the interpreter does not know.
    """

    heads: int
    d_key: int
    d_value: int
    n_chunks: int
    chunks_per_segment: int
    n_segments: int
    n_warpgroups: int
    scale: float
    is_backwards: bool
    states_only: bool
    is_interpreted: bool


def advance_chunk(plan: Plan, tiles: dict[str, Any], ref: dict[str, Any], state):
    """Returns the state after one chunk, and the chunk's output (None if states_only)."""
    scale_out, scale_in = (1.0, plan.scale) if plan.is_backwards else (plan.scale, 1.0)
    sums = load(tiles["sums"].at[0], plgpu.Layout.WGMMA.reduce(1))
    end = tiles["sums"][0, CHUNK_LEN - 1]
    from_start, to_end, forget = jnp.exp2(sums), jnp.exp2(end - sums), jnp.exp2(end)
    read, write = (to_end, from_start) if plan.is_backwards else (from_start, to_end)
    scores = out = None
    if not plan.states_only:
        ref["state_smem"][...] = state.astype(jnp.bfloat16)
        plgpu.commit_smem()
        scores, out = _read(plan, tiles, ref, sums)
        out = out * _over_columns(scale_out * read)
        scores = _as_operand(plan, ref, scores.astype(jnp.bfloat16))
    z = load(tiles["z"], plgpu.Layout.WGMMA).astype(jnp.float32)
    # The tile still holds the output of the chunk before, on its way to memory.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    ref["tile_smem"][...] = (z * _over_columns(scale_in * write)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    written = (_transposed(tiles["y"]), ref["tile_smem"])
    if plan.states_only:
        (state,) = _add_products(plan, (state * forget, *written))
    else:
        out, state = _add_products(plan, (out, scores, tiles["z"]), (state * forget, *written))
    return state, out


def _read(plan: Plan, tiles: dict[str, Any], ref: dict[str, Any], sums):
    """Returns the chunk's decayed scores and what its tokens read from the state, undecayed."""
    shape = (CHUNK_LEN, CHUNK_LEN)
    other = load(tiles["sums"].at[1], plgpu.Layout.WGMMA.reduce(0))

    def decays():
        i, j = (
            plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
            for axis in (0, 1)
        )
        difference = _over_columns(sums) - lax.broadcast_in_dim(other, shape, [1])
        if plan.is_backwards:
            i, j, difference = j, i, -difference
        power = jnp.exp2(jnp.where(i >= j, difference, 0.0))
        return jnp.where(i >= j, plan.scale * power, 0.0)

    def products(scores, read):
        plgpu.wgmma(scores, tiles["x"], _transposed(tiles["y"]))
        plgpu.wgmma(read, tiles["x"], ref["state_smem"])
        decay = decays()  # while the products are under way
        return scores[...] * decay, read[...]

    return pl.run_scoped(
        products,
        plgpu.WGMMAAccumulatorRef(shape, jnp.float32),
        plgpu.WGMMAAccumulatorRef((CHUNK_LEN, TILE), jnp.float32),
    )


def _add_products(plan: Plan, *sums):
    """Returns c + a @ b of each (c, a, b) in sums, all under way at the same time."""
    if plan.is_interpreted:

        def product(accumulator, a, b):
            plgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        return tuple(
            c
            + pl.run_scoped(
                functools.partial(product, a=a, b=b), plgpu.WGMMAAccumulatorRef(c.shape, c.dtype)
            )
            for c, a, b in sums
        )

    def add(accumulators):
        for accumulator, (_, a, b) in zip(accumulators, sums, strict=True):
            plgpu.wgmma(accumulator, a, b)

    return pl.run_state(add)(tuple(plgpu.WGMMAAccumulatorRef.init(c) for c, _, _ in sums))


def _as_operand(plan: Plan, ref: dict[str, Any], scores):
    """Returns what wgmma may take as its first operand."""
    if not plan.is_interpreted:
        return scores
    ref["scores_smem"][...] = scores
    return ref["scores_smem"]  # committed with the next tile


def store(out, ref: dict[str, Any], index) -> None:
    """Writes one chunk's output [64, 64]: bfloat16 by TMA, float32 fills its sectors by itself."""
    if ref["out"].dtype != jnp.bfloat16:
        ref["out"][index] = out.astype(ref["out"].dtype)
        return
    ref["tile_smem"][...] = out.astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(ref["tile_smem"], ref["out"].at[index])


def _over_columns(x):
    """Returns one number a row, [64], as [64, 64]."""
    return lax.broadcast_in_dim(x, (CHUNK_LEN, TILE), [0])


def load(ref, layout, *, optimized: bool = True):
    """Returns what a reference holds, in registers of this layout."""
    index = () if IS_NEW else ((),)
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def _transposed(ref):
    return ref.transpose((1, 0)) if IS_NEW else plgpu.transpose_ref(ref, (1, 0))
