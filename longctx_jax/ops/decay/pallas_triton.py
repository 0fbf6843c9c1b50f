"""Decay attention on NVIDIA GPUs in Pallas, lowered by Triton: the walk over chunks.

A block of the grid owns one head of one row, one tile of value columns and one segment of the
sequence, and walks its chunks with the state [key, value tile] in registers:

    O = scale [ ((X Y^T) o M) Z + a . (X S) ],   S <- f S + (b . Y)^T Z

The same kernel walking backwards gives the gradients (`linear_vjp.py`), so no product of a
transposed product appears. Factors are made in the kernel from log2 sums, as differences that are
masked before exp2 (`chunks.py` has the formulas).

Bytes a token and head: 2 (key + value) items in and out, plus key + value items again where the
sequence is cut into segments (`kernel_inputs.py`); 4 batch heads segments key value for the states.

Deprecated upstream from jax 0.11 on; `pallas_mosaic_gpu.py` is the backend that stays. Nothing else
imports this file but `select.py`, when it runs it.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from longctx_jax.ops.decay.facts import Facts
from longctx_jax.ops.decay.kernel_inputs import (
    decay_inputs,
    pad_state,
    pad_width,
    segment_count,
    states_before_segments,
)
from longctx_jax.ops.decay.linear_vjp import differentiable
from longctx_jax.ops.decay.pallas_triton_step import MIN_WIDTH, one_token
from longctx_jax.ops.triton_kernels import quietly
from longctx_jax.typing import Array, Bool, DType, Float

TF32_PRECISIONS = ("default", "fastest", "tensorfloat32", "bfloat16", "TF32_TF32_F32")
MAX_WIDTH = {"bfloat16": 256, "float32": 128}  # of key and value


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the kernel is cut up.

    Attributes:
        chunk_len: tokens a chunk; 64 is the smallest tile of Hopper's matrix units.
        block_value: value columns a block owns.
        n_warps: warps a block.
        n_stages: depth of the software pipeline of its loads.
        n_segments: segments that walk at the same time.
    """

    chunk_len: int
    block_value: int
    n_warps: int
    n_stages: int
    n_segments: int = 1


def tiling(d_key: int, d_value: int, dtype: DType, n_rows: int, seq: int) -> Tiling:
    """Returns the tiling of a walk with these padded widths; n_rows = batch * heads.

    Chosen by compiling for an H200: none of them spills more than 64 bytes of registers
    (results/decay_h200_registers.jsonl).
    """
    if jnp.dtype(dtype).itemsize == 2:
        chunk, block, n_warps = (64, 64, 4) if d_key <= 128 else (64, 16, 8)
    elif d_key <= 64:  # TF32 operands take twice the registers
        chunk, block, n_warps = 64, 16 if d_key <= 32 else 32, 4
    else:
        chunk, block, n_warps = 16, 32, 4
    block = min(d_value, block)
    n_segments = segment_count(n_rows * (d_value // block), -(-seq // chunk))
    return Tiling(chunk, block, n_warps, 2, n_segments)


def unsupported(facts: Facts) -> str:
    """Returns why the kernel cannot run, "" if it can."""
    if facts.platform != "gpu":
        return f"a GPU kernel, and jax runs on {facts.platform}"
    if facts.dtype not in ("float32", "bfloat16"):
        return f"takes float32 or bfloat16, not {facts.dtype}"
    if not re.fullmatch(r"([89]|\d\d)\.\d|", facts.capability):
        return f"needs compute capability 8.0 or more, not {facts.capability}"
    if facts.dtype == "float32" and facts.matmul_precision not in TF32_PRECISIONS:
        return f"multiplies float32 in TF32, and matmul precision is {facts.matmul_precision}"
    widest = max(facts.d_key, facts.d_value)
    limit = MAX_WIDTH[facts.dtype]
    if widest > limit:
        return f"{facts.dtype} heads wider than {limit} do not fit the registers: {widest}"
    return ""


def decay_attention_pallas_triton(
    query: Float[Array, "batch seq query_heads key"],
    key: Float[Array, "batch seq key_heads key"],
    value: Float[Array, "batch seq value_heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq _"] | None = None,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`; heads are shared without being copied.

    float32 input is multiplied in TF32 (relative error 3e-4), which is also what XLA's matrix
    products do by default; with `jax.default_matmul_precision("highest")` the kernel declines.

    Cost: 2 batch heads seq (64 (key + value) + 2 key value) flops, three times that backwards;
    memory of the backward pass: the inputs alone.
    """
    return _run(interpret)(query, key, value, log_decay, state, reset, scale)


@functools.cache
def _run(interpret: bool):
    return differentiable(functools.partial(walk, interpret=interpret))


def walk(
    x: jax.Array,
    y: jax.Array,
    z: jax.Array,
    log_decay: jax.Array,
    state: jax.Array | None,
    *,
    reset: jax.Array | None,
    scale: float,
    is_backwards: bool,
    out_dtype: DType,
    interpret: bool = False,
    tiles: Tiling | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns sum_j M_ij (x_i . y_j) z_j and the last state: see `linear_vjp.Walk`.

    Args:
        x: [batch, seq, heads, key]; its heads, like those of y and z, divide those of log_decay.
        y: as x.
        z: [batch, seq, heads, value].
        log_decay: float32 [heads], or finite [batch, seq, heads].
        state: float32 [batch, heads, key, value] or None.
        reset: bool [batch, seq, heads or 1] or None.
        scale: of the output forwards; of scores and of what enters the state backwards.
        is_backwards: walk from the last token to the first, M transposed.
        out_dtype: of the output.
        interpret: run in the interpreter, anywhere.
        tiles: None = `tiling`.
    """
    if x.shape[1] == 1 and not is_backwards:
        options = {"reset": reset, "scale": scale, "interpret": interpret}
        out, last = one_token(x, y, z, log_decay, state, **options)
        return out.astype(out_dtype), last
    batch, seq, _, d_key = x.shape
    d_value, n_heads = z.shape[-1], log_decay.shape[-1]
    widths = [max(MIN_WIDTH, pl.next_power_of_2(d)) for d in (d_key, d_value)]
    x, y, z = pad_width(x, widths[0]), pad_width(y, widths[0]), pad_width(z, widths[1])
    state = pad_state(state, *widths)
    tiles = tiles or tiling(widths[0], widths[1], x.dtype, batch * n_heads, seq)
    chunk = tiles.chunk_len
    precision = _precision(x.dtype, interpret)
    decay = decay_inputs(log_decay, reset, seq, chunk, is_exact=precision is not None)
    chunks_per_segment = math.ceil(math.ceil(seq / chunk) / tiles.n_segments)
    segment_len = chunks_per_segment * chunk
    n_segments = -(-seq // segment_len)
    call = functools.partial(
        _call,
        decay=decay,
        scale=scale,
        is_backwards=is_backwards,
        tiles=dataclasses.replace(tiles, n_segments=n_segments),
        chunks_per_segment=chunks_per_segment,
        precision=precision,
        interpret=interpret,
    )
    if n_segments > 1:
        (added,) = call(None, y, z, None, n_heads=n_heads)
        state = states_before_segments(
            added, state, log_decay, reset, seq, segment_len, is_backwards=is_backwards
        )
    elif state is not None:
        state = state[:, :, None]
    out, last = call(x, y, z, state, n_heads=n_heads, out_dtype=out_dtype)
    return out[..., :d_value], last[:, :, 0, :d_key, :d_value]


def _call(
    x,
    y,
    z,
    state,
    *,
    decay,
    scale,
    is_backwards,
    tiles: Tiling,
    chunks_per_segment,
    precision,
    interpret,
    n_heads,
    out_dtype=None,
):
    """Runs the kernel over (value tiles, segments, batch * heads); returns [out, states].

    x None: [states] alone, the segments' own, of all segments but the last one walked.
    """
    batch, seq, _, d_key = y.shape
    d_value, block = z.shape[-1], tiles.block_value
    states_only = x is None
    n_segments = tiles.n_segments - states_only
    grid = (d_value // block, n_segments, batch * n_heads)

    def tokens(array, is_tiled):  # the whole sequence of one head
        group = n_heads // array.shape[2]
        width = block if is_tiled else d_key

        def index(tile, segment, row):
            del segment
            return row // n_heads, 0, row % n_heads // group, tile if is_tiled else 0

        return pl.BlockSpec((None, seq, None, width), index)

    def per_token(array):  # [batch, heads, padded]
        return pl.BlockSpec(
            (None, None, array.shape[2]),
            lambda tile, segment, row: (row // n_heads, row % n_heads, 0),
        )

    def states(n):  # [batch, heads, n, key, value]; one state for all segments if n == 1
        def index(tile, segment, row):
            return row // n_heads, row % n_heads, segment if n > 1 else 0, 0, tile

        return pl.BlockSpec((None, None, None, d_key, block), index)

    arrays: dict[str, jax.Array | None] = {
        "x": x,
        "y": y,
        "z": z,
        "per_step": decay.per_step,
        "coarse": decay.coarse,
        "fine": decay.fine,
        "state": state,
    }
    specs = {
        "x": lambda a: tokens(a, False),
        "y": lambda a: tokens(a, False),
        "z": lambda a: tokens(a, True),
        "per_step": lambda a: pl.BlockSpec((1,), lambda tile, segment, row: (row % n_heads,)),
        "coarse": per_token,
        "fine": per_token,
        "state": lambda a: states(tiles.n_segments),
    }
    given = {name: array for name, array in arrays.items() if array is not None}
    state_shape = (batch, n_heads, n_segments if states_only else 1, d_key, d_value)
    out_shape = [jax.ShapeDtypeStruct(state_shape, jnp.float32)]
    out_specs = [states(state_shape[2])]
    if not states_only:
        out_shape = [jax.ShapeDtypeStruct((batch, seq, n_heads, d_value), out_dtype), *out_shape]
        spec = pl.BlockSpec(
            (None, seq, None, block),
            lambda tile, segment, row: (row // n_heads, 0, row % n_heads, tile),
        )
        out_specs = [spec, *out_specs]
    body = functools.partial(
        _kernel,
        names=tuple(given),
        states_only=states_only,
        scale=scale,
        is_backwards=is_backwards,
        seq=seq,
        chunk=tiles.chunk_len,
        chunks_per_segment=chunks_per_segment,
        n_segments=tiles.n_segments,
        precision=precision,
    )
    run = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[specs[name](array) for name, array in given.items()],
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=tiles.n_warps, num_stages=tiles.n_stages),
        interpret=interpret,
        name="decay_attention_states" if states_only else "decay_attention_walk",
    )
    return quietly(run, *given.values())


def _precision(dtype, interpret: bool):
    """Returns the precision of products: TF32 for float32 on the device, as XLA's default is."""
    is_exact = interpret and jnp.dtype(dtype).itemsize > 2
    return jax.lax.Precision.HIGHEST if is_exact else None


def _kernel(
    *refs,
    names,
    states_only,
    scale,
    is_backwards,
    seq,
    chunk,
    chunks_per_segment,
    n_segments,
    precision,
):
    """One block: walks the chunks of its segment, the state in registers."""
    ref = dict(zip(names, refs, strict=False))
    out_ref, last_ref = refs[-2:]  # states_only: there is no out_ref, and none is used
    is_ragged = seq % chunk != 0
    n_chunks = -(-seq // chunk)
    segment = pl.program_id(1) + (1 if states_only and is_backwards else 0)
    first_chunk = segment * chunks_per_segment
    n_own = jnp.minimum(chunks_per_segment, n_chunks - first_chunk)
    if n_chunks % chunks_per_segment == 0:
        n_own = chunks_per_segment
    row = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    is_visible = row <= column if is_backwards else row >= column
    dot = functools.partial(plt.dot, precision=precision)

    def load(name, start):
        at = ref[name].at[pl.ds(start, chunk), :]
        if not is_ragged:
            return plt.load(at)
        mask = (start + jnp.arange(chunk) < seq)[:, None]
        return plt.load(at, mask=jnp.broadcast_to(mask, at.shape), other=0.0)

    def advance(i, state):
        c = first_chunk + (n_own - 1 - i if is_backwards else i)
        start = c * chunk
        y, z = load("y", start), load("z", start)
        before, after, forget, decay = _factors(
            ref, start, chunk, seq, is_ragged, not states_only, is_visible, is_backwards
        )
        read, write = (after, before) if is_backwards else (before, after)
        if is_backwards:
            write = scale * write
        if not states_only:
            x = load("x", start)
            scores = dot(x, y, trans_b=True) * (scale * decay)
            read = read if is_backwards else scale * read
            out = dot(x, state.astype(x.dtype)) * read[:, None]
            out = out + dot(scores.astype(z.dtype), z)
            at = out_ref.at[pl.ds(start, chunk), :]
            mask = None
            if is_ragged:
                mask = jnp.broadcast_to((start + jnp.arange(chunk) < seq)[:, None], at.shape)
            plt.store(at, out.astype(out_ref.dtype), mask=mask)
        written = (y * write[:, None]).astype(y.dtype)
        return state * forget + dot(written, z, trans_a=True)

    start = ref["state"][...] if "state" in ref else jnp.zeros(last_ref.shape, jnp.float32)
    state = jax.lax.fori_loop(0, n_own, advance, start)
    if states_only or n_segments == 1:
        last_ref[...] = state
    else:
        is_last = segment == (0 if is_backwards else n_segments - 1)

        @pl.when(is_last)
        def _():
            last_ref[...] = state


def _factors(ref, start, chunk, seq, is_ragged, with_decay, is_visible, is_backwards):
    """Returns exp(G_i), exp(G_end - G_i), exp(G_end) and M (transposed backwards) of a chunk."""
    time = jnp.arange(chunk)
    decay = None
    if "per_step" in ref:
        per_step = ref["per_step"][0]
        length = jnp.minimum(chunk, seq - start) if is_ragged else chunk
        before = jnp.exp2(per_step * (time + 1).astype(jnp.float32))
        after = jnp.exp2(per_step * jnp.maximum(length - 1 - time, 0).astype(jnp.float32))
        forget = jnp.exp2(per_step * jnp.asarray(length, jnp.float32))
        distance = (time[:, None] - time[None, :]) * (-1 if is_backwards else 1)
        exponent = per_step * jnp.maximum(distance, 0).astype(jnp.float32)
    else:
        parts = [ref[name] for name in ("coarse", "fine") if name in ref]
        sums = [part[pl.ds(start, chunk)] for part in parts]
        end = [part[start + chunk - 1] for part in parts]
        before = jnp.exp2(sum(sums))
        after = jnp.exp2(sum(e - s for e, s in zip(end, sums, strict=True)))
        forget = jnp.exp2(sum(end))
        exponent = sum(s[:, None] - s[None, :] for s in sums)
        exponent = jnp.minimum(-exponent if is_backwards else exponent, 0.0)
    if with_decay:
        decay = jnp.where(is_visible, jnp.exp2(exponent), 0.0)
    return before, after, forget, decay
