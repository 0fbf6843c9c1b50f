"""Decay attention on Hopper GPUs in Pallas, lowered by Mosaic GPU: the walk over chunks.

A warpgroup owns one head of one row, one tile of 64 value columns and one segment of the sequence,
and walks its chunks with the state [key, 64] in float32 registers:

    O = scale [ ((X Y^T) o M) Z + a . (X S) ],   S <- f S + Y^T (b . Z)

All four products are wgmma in bfloat16 with float32 sums. Tokens come by TMA, `_n_stages` chunks in
flight, straight from [batch, seq, heads, width]: nothing is transposed or copied beforehand, unless
seq or a width is no multiple of 64 (they are padded with zeros). Values over 64 wide are walked by
two warpgroups of one block, which share the tiles of X and Y, and a third one that only fetches;
otherwise a block is one warpgroup that fetches for itself, and two blocks share a multiprocessor.
The same kernel walking backwards gives the gradients (`linear_vjp.py`).

M, a, b and f come from one row of numbers a chunk, the log2 sums G of its decays, as exp2 of
differences that are masked before exp2 (`chunks.py` has the formulas). A reset is a decay of
2^-160, which is 0 in float32; constant decay is a row that all chunks share. Padding has decay 1.

Bytes a token and head from memory: 4 key + 2 value in, 2 value out, 8 where the decay is per token;
where the sequence is cut into segments (`kernel_inputs.py`) 2 (key + value) more.

The interpreter of jax 0.11 and 0.12 knows neither wgmma with an operand in registers nor an
accumulator that starts from a value. Interpreted, the scores pass through shared memory and sums
are added outside: the only two differences, both in `pallas_mosaic_gpu_chunk.py`.

Nothing else imports this file but `select.py`, when it runs it.
"""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longctx_jax.ops.decay.facts import Facts
from longctx_jax.ops.decay.kernel_inputs import (
    LOG2_E,
    RESET,
    pad_state,
    pad_width,
    segment_count,
    states_before_segments,
)
from longctx_jax.ops.decay.linear_vjp import differentiable
from longctx_jax.ops.decay.pallas_mosaic_gpu_chunk import (
    CHUNK_LEN,
    IS_NEW,
    TILE,
    Plan,
    advance_chunk,
    load,
    store,
)
from longctx_jax.ops.decay.powers import log_sums
from longctx_jax.typing import Array, Bool, DType, Float

MAX_WIDTH = 128  # a state [256, 64] takes half of the registers and the scores do not fit beside it
MEMORY_REGISTERS = 40  # a thread of the warpgroup that fetches; the others get 232
HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")


def unsupported(facts: Facts) -> str:
    """Returns why the kernel cannot run, "" if it can."""
    if facts.platform != "gpu":
        return f"a GPU kernel, and jax runs on {facts.platform}"
    if not HOPPER.search(facts.device):
        return f"needs wgmma, hence compute capability 9.0 (H100, H200), not {facts.device}"
    if facts.dtype != "bfloat16":
        return f"takes bfloat16, not {facts.dtype}"
    if max(facts.d_key, facts.d_value) > MAX_WIDTH:
        return f"heads wider than {MAX_WIDTH}: key {facts.d_key}, value {facts.d_value}"
    return ""


def decay_attention_pallas_mosaic_gpu(
    query: Float[Array, "batch seq query_heads key"],
    key: Float[Array, "batch seq key_heads key"],
    value: Float[Array, "batch seq value_heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq _"] | None = None,
    scale: float,
    interpret: Any = None,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns (out, state) as `decay_attention`; heads are shared without being copied.

    Args:
        query: bfloat16, as are key and value; key and value widths of at most `MAX_WIDTH`.
        key: as query.
        value: as query.
        log_decay: float32.
        state: float32; None = zeros.
        reset: True where a token starts a new document.
        scale: of the output.
        interpret: None, or `mosaic_gpu.InterpretGPUParams` (jax 0.11.2 on) to run on any machine.

    Raises:
        NotImplementedError: if dtypes or widths are not those above.

    Cost: 2 batch heads seq (64 (key + value) + 2 key value) flops with widths padded to a multiple
    of 64, the scores again for each 64 value columns; three times that backwards. Memory of the
    backward pass: the inputs alone.
    """
    return _run(interpret)(query, key, value, log_decay, state, reset, scale)


@functools.cache
def _run(interpret):
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
    interpret: Any = None,
    n_segments: int | None = None,
    n_warpgroups: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns sum_j M_ij (x_i . y_j) z_j and the last state: see `linear_vjp.Walk`.

    Args:
        x: bfloat16 [batch, seq, heads, key]; its heads, like those of y and z, divide those of
            log_decay.
        y: as x.
        z: bfloat16 [batch, seq, heads, value].
        log_decay: float32 [heads], or finite [batch, seq, heads].
        state: float32 [batch, heads, key, value] or None.
        reset: bool [batch, seq, heads or 1] or None.
        scale: of the output forwards; of scores and of what enters the state backwards.
        is_backwards: walk from the last token to the first, M transposed.
        out_dtype: of the output.
        interpret: None, or `mosaic_gpu.InterpretGPUParams`.
        n_segments: how many segments to walk at the same time; None = enough to fill the device.
        n_warpgroups: that compute in one block, 1 or 2; None = one for each 64 value columns.

    Raises:
        NotImplementedError: if x, y or z is not bfloat16, or a width is over `MAX_WIDTH`.
    """
    (batch, seq, _, d_key), d_value = x.shape, z.shape[-1]
    if {x.dtype, y.dtype, z.dtype} != {jnp.dtype(jnp.bfloat16)}:
        raise NotImplementedError(
            "decay attention by Mosaic GPU: query, key and value must be bfloat16: got "
            f"{x.dtype}, {y.dtype} and {z.dtype}; cast them or choose another implementation"
        )
    if max(d_key, d_value) > MAX_WIDTH:
        raise NotImplementedError(
            f"decay attention by Mosaic GPU: heads may be {MAX_WIDTH} wide: got key {d_key}, "
            f"value {d_value}; use narrower heads or another implementation"
        )
    heads, n_chunks = log_decay.shape[-1], pl.cdiv(seq, CHUNK_LEN)
    widths = [pl.cdiv(d, TILE) * TILE for d in (d_key, d_value)]
    n_segments = n_segments or segment_count(batch * heads * widths[1] // TILE, n_chunks)
    per_segment = pl.cdiv(n_chunks, n_segments)
    plan = Plan(
        heads=heads,
        d_key=widths[0],
        d_value=widths[1],
        n_chunks=n_chunks,
        chunks_per_segment=per_segment,
        n_segments=pl.cdiv(n_chunks, per_segment),
        n_warpgroups=n_warpgroups or widths[1] // TILE,
        scale=scale,
        is_backwards=is_backwards,
        states_only=False,
        is_interpreted=interpret is not None,
    )
    x, y, z = (
        pad_width(_whole_chunks(a), width)
        for a, width in ((x, widths[0]), (y, widths[0]), (z, widths[1]))
    )
    state = pad_state(state, *widths)
    sums = _sums_of_chunks(log_decay, reset, seq)
    if plan.n_segments > 1:
        _, added = _launch(plan, None, y, z, sums, None, None, interpret)
        state = states_before_segments(
            added,
            state,
            log_decay,
            reset,
            seq,
            per_segment * CHUNK_LEN,
            is_backwards=is_backwards,
        )
    elif state is not None:
        state = state[:, :, None]
    out, last = _launch(plan, x, y, z, sums, state, out_dtype, interpret)
    return out[:, :seq, :, :d_value], last[:, :, 0, :d_key, :d_value]


def _whole_chunks(x: jax.Array) -> jax.Array:
    """Returns [batch, seq, ...] with zeros after the last token up to whole chunks."""
    missing = -x.shape[1] % CHUNK_LEN
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _sums_of_chunks(log_decay: jax.Array, reset: jax.Array | None, seq: int) -> jax.Array:
    """Returns log2 sums of the decays within chunks, float32 [batch or 1, heads, n, 2, 64].

    Twice the same row: the lowering merges two loads of one row even if their layouts differ, and
    then finds no layout. n is the number of chunks, except for constant decays without resets: one
    row for all chunks, and one more for a ragged last chunk.

    One float32 a token is enough beside bfloat16 scores: its error, half a unit in the last place
    of |G| <= 64 x 160, is below 5e-4 of a power, and below 1e-5 where |G| < 200.
    """
    heads, n_chunks = log_decay.shape[-1], pl.cdiv(seq, CHUNK_LEN)
    if log_decay.ndim == 1 and reset is None:
        n_rows = 1 if seq % CHUNK_LEN == 0 else min(2, n_chunks)
        token = jnp.arange((n_chunks - n_rows) * CHUNK_LEN, n_chunks * CHUNK_LEN)
        logs = jnp.where(token < seq, log_decay[:, None], 0.0)[None]
    else:
        shape = (*((1, 1) if log_decay.ndim == 1 else log_decay.shape[:2]), heads)
        logs = log_decay.reshape(shape)
        if reset is not None:
            logs = jnp.where(reset, -jnp.inf, logs)
        logs = jnp.swapaxes(_whole_chunks(logs), 1, 2)
    logs = jnp.maximum(LOG2_E * logs.astype(jnp.float32), RESET)
    sums = log_sums(logs.reshape(*logs.shape[:2], -1, CHUNK_LEN))
    total = sums.coarse + sums.fine
    return jnp.stack([total, total], axis=3)


def _launch(
    plan: Plan,
    x: jax.Array | None,
    y: jax.Array,
    z: jax.Array,
    sums: jax.Array,
    state: jax.Array | None,
    out_dtype: DType | None,
    interpret: Any,
) -> tuple[Any, jax.Array]:
    """Returns (out, last state [batch, heads, 1, key, value]) or (None, segments' own states).

    The latter if x is None: states of all segments but the one walked last.

    Args:
        plan: see `Plan`; all arrays are padded.
        x: [batch, seq, heads, key].
        y: as x.
        z: [batch, seq, heads, value].
        sums: of `_sums_of_chunks`.
        state: before each segment, [batch, heads, segments, key, value], None = zeros.
        out_dtype: of the output.
        interpret: see `walk`.
    """
    plan = dataclasses.replace(plan, states_only=x is None)
    batch, seq = y.shape[:2]
    n_segments = plan.n_segments - plan.states_only
    inputs = {"x": x, "y": y, "z": z, "sums": sums, "state": state}
    inputs = {name: array for name, array in inputs.items() if array is not None}
    n_last = n_segments if plan.states_only else 1
    outputs = {
        "last": jax.ShapeDtypeStruct(
            (batch, plan.heads, n_last, plan.d_key, plan.d_value), jnp.float32
        )
    }
    scratch = {"tile_smem": _bfloat16_smem(plan, CHUNK_LEN)}
    if not plan.states_only:
        outputs["out"] = jax.ShapeDtypeStruct((batch, seq, plan.heads, plan.d_value), out_dtype)
        scratch["state_smem"] = _bfloat16_smem(plan, plan.d_key)
        if plan.is_interpreted:
            scratch["scores_smem"] = _bfloat16_smem(plan, CHUNK_LEN)
    names = (*inputs, *outputs, *scratch)
    options: dict[str, Any] = (
        {} if IS_NEW else {"lowering_semantics": plgpu.LoweringSemantics.Warpgroup}
    )
    threads = {"num_threads": plan.n_warpgroups + 1, "thread_name": "warpgroup"}
    run = plgpu.kernel(
        lambda *refs: _kernel(plan, dict(zip(names, refs, strict=True))),
        out_type=tuple(outputs.values()),
        scratch_types=tuple(scratch.values()),
        grid=(plan.d_value // (TILE * plan.n_warpgroups), n_segments, plan.heads, batch),
        grid_names=("tile", "segment", "head", "batch"),
        compiler_params=plgpu.CompilerParams(approx_math=True, **options),
        interpret=interpret,
        **(threads if plan.n_warpgroups > 1 else {}),
    )
    last, *out = run(*inputs.values())
    return (None if plan.states_only else out[0]), last


def _bfloat16_smem(plan: Plan, rows: int):
    """Returns the type of a [rows, 64] tile for each warpgroup that wgmma and TMA can read."""
    each = (plan.n_warpgroups,) if plan.n_warpgroups > 1 else ()
    return plgpu.SMEM((*each, rows, TILE), jnp.bfloat16, transforms=_transforms())


def _transforms():
    return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)


def _n_stages(plan: Plan) -> int:
    """Returns how many chunks are in flight, so that two warpgroups share the memory (227 KB)."""
    return 3 if plan.n_warpgroups > 1 or plan.d_key <= 64 else 2


def _kernel(plan: Plan, ref: dict[str, Any]) -> None:
    """One block: every computing warpgroup walks the chunks of one segment for its value tile."""
    batch, head, segment, tile = (lax.axis_index(n) for n in ("batch", "head", "segment", "tile"))
    of_launch = segment  # backwards the states-only launch leaves out the first segment in time
    segment = segment + (plan.states_only and plan.is_backwards)
    first_chunk = segment * plan.chunks_per_segment
    n_own = plan.chunks_per_segment
    if plan.n_chunks % plan.chunks_per_segment:
        n_own = jnp.minimum(n_own, plan.n_chunks - first_chunk)
    own_tile, own = 0, ref
    if plan.n_warpgroups > 1:
        own_tile = lax.axis_index("warpgroup")
        own = {name: r.at[own_tile] if name.endswith("_smem") else r for name, r in ref.items()}
    columns = pl.ds((tile * plan.n_warpgroups + own_tile) * TILE, TILE)

    def chunk_of(step):
        return first_chunk + (n_own - 1 - step if plan.is_backwards else step)

    def tokens(name):
        group = plan.heads // ref[name].shape[2]
        width = plan.n_warpgroups * TILE if name == "z" else plan.d_key

        def index(step):
            return batch, chunk_of(step), lax.div(head, jnp.int32(group)), tile * (name == "z")

        block = (None, CHUNK_LEN, None, width)
        return plgpu.BlockSpec(block, index, transforms=_transforms())

    def sums_of(step):
        n_rows, row = ref["sums"].shape[2], chunk_of(step)
        row = jnp.maximum(row - (plan.n_chunks - n_rows), 0)
        return batch * (ref["sums"].shape[0] > 1), head, row, 0, 0

    def advance(indices, *refs_and_state) -> Any:
        *refs, state = refs_and_state
        tiles = dict(zip(names, refs, strict=True))
        if plan.n_warpgroups > 1:
            tiles["z"] = tiles["z"].at[:, pl.ds(own_tile * TILE, TILE)]
        state, out = advance_chunk(plan, tiles, own, state)
        if out is not None:
            start = chunk_of(indices[0]) * CHUNK_LEN
            store(out, own, (batch, pl.ds(start, CHUNK_LEN), head, columns))
        return state

    def walk_chunks(pipeline):
        if "state" in ref:
            before = ref["state"].at[batch, head, segment, :, columns]
            state = load(before, plgpu.Layout.WGMMA, optimized=False)
        else:
            state = jnp.zeros((plan.d_key, TILE), jnp.float32)
            state = plgpu.layout_cast(state, plgpu.Layout.WGMMA)
        state = pipeline(state)
        if plan.states_only or plan.n_segments == 1:
            ref["last"][batch, head, of_launch, :, columns] = state
        else:

            @pl.when(segment == (0 if plan.is_backwards else plan.n_segments - 1))
            def _():
                ref["last"][batch, head, 0, :, columns] = state

        plgpu.wait_smem_to_gmem(0)

    names: tuple[str, ...] = ("y", "z", "sums") if plan.states_only else ("x", "y", "z", "sums")
    specs = {name: tokens(name) for name in names if name != "sums"}
    specs["sums"] = plgpu.BlockSpec((None, None, None, 2, CHUNK_LEN), sums_of)
    options = {
        "grid": (n_own,),
        "in_specs": [specs[name] for name in names],
        "max_concurrent_steps": _n_stages(plan),
    }
    inputs = [ref[name] for name in names]
    if plan.n_warpgroups == 1:
        walk_chunks(lambda s: plgpu.emit_pipeline(advance, init_carry=s, **options)(*inputs))
        return
    plgpu.emit_pipeline_warp_specialized(
        advance,
        memory_registers=MEMORY_REGISTERS,
        num_compute_wgs=plan.n_warpgroups,
        wg_axis="warpgroup",
        compute_context=walk_chunks,
        **options,
    )(*inputs)
