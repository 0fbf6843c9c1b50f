"""One query against many cached keys on NVIDIA GPUs: split-key attention in Pallas, by Triton.

    out = sum_j softmax_j(scale q . k_j + bias(distance_j)) v_j

A token that is decoded has too few queries to fill a GPU, so the keys are cut into splits that run
side by side, each with an online softmax, and the results are merged (Dao et al. 2023,
"Flash-Decoding for long-context inference"). All query heads of a key head share one reading of it.
Values may be the first columns of the keys, as when projections are absorbed into the query: then a
row is read once and used twice. Only tiles between the first and the last visible slot are read, so
a cache costs what it holds and not what it could hold.

Deprecated upstream from jax 0.11 on. Nothing else imports this file but `cache_attention.py`, when
it runs it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from longctx_jax.ops.partition import by_rows_and_heads
from longctx_jax.ops.position import DistanceBias, relative_bucket
from longctx_jax.ops.triton_kernels import not_for_hopper, quietly
from longctx_jax.typing import DType

LOG2_E = 1.4426950408889634
MIN_WIDTH = 16  # of Triton's products, in every direction
MAX_CHUNK = 512  # columns of a key that are one array in a kernel
MAX_WIDTH = 2048  # numbers of a value: more do not fit the registers
MAX_ROTARY = 64  # numbers of a key beside as many as the widest value has
PROGRAMS = 264  # wanted side by side: two on each of the 132 multiprocessors of an H200
HIDDEN = -1  # distance of a key that is not seen
# Axes of every array: b batch, h key heads, g query heads of one; "." = layers, keys, columns.
AXES = {
    "query": "bhg.",
    "key": ".bh..",
    "value": ".bh..",
    "distance": "b.",
    "bucket": "b.",
    "table": "hg.",
    "slopes": "hg",
    "layer": ".",
    "tiles": "b.",
}


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a call is cut up.

    Attributes:
        heads: query heads of a program, those past the last one filled up.
        keys: keys a tile.
        n_warps: warps a program.
        n_stages: depth of the software pipeline of its loads.
    """

    heads: int
    keys: int
    n_warps: int
    n_stages: int


def tiling(d_key: int, d_value: int, group: int, dtype: DType) -> Tiling:
    """Returns the tiling for keys and values of these widths.

    Chosen by compiling for an H200 (results/flash_decoding_h200_registers.jsonl): none of them
    spills. The sums of a program are heads x d_value float32 numbers in registers, tiles of keys
    are in shared memory.

    Args:
        d_key: numbers of a key.
        d_value: numbers of a value.
        group: query heads of a key head.
        dtype: of keys.
    """
    widest = max(d_key, d_value)
    half = 2 if jnp.dtype(dtype).itemsize > 2 else 1  # float32 tiles are twice as large
    heads = min(32, max(MIN_WIDTH, pl.next_power_of_2(group)))
    if widest <= 128:
        return Tiling(heads, 128 // half, 4, 3)
    if widest <= 256:
        return Tiling(heads, 64 // half, 4, 3)
    if widest <= 640:
        return Tiling(heads, 64 // half, 8, 2)
    if widest <= 1024 + 64:
        return Tiling(MIN_WIDTH, 32 // half, 8, 2)
    return Tiling(MIN_WIDTH, 16, 8 if d_key == d_value else 16, 2)


def unsupported(facts: Any) -> str:
    """Returns why the kernel cannot run, "" if it can."""
    if reason := not_for_hopper(facts, ("bfloat16", "float16")):
        return reason
    if facts.query_len != 1:
        return f"takes one query, not {facts.query_len}"
    if facts.d_key % MIN_WIDTH or facts.d_value % MIN_WIDTH:
        return f"takes widths that are multiples of 16: {facts.d_key} and {facts.d_value}"
    if facts.d_value > MAX_WIDTH:
        return f"sums of more than {MAX_WIDTH} numbers do not fit the registers: {facts.d_value}"
    if facts.d_key > MAX_WIDTH + MAX_ROTARY:
        return f"takes keys of up to {MAX_WIDTH + MAX_ROTARY} numbers: {facts.d_key}"
    return ""


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array | None,
    distance: jax.Array,
    relative_bias: DistanceBias | None,
    *,
    scale: float,
    d_value: int,
    layer: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns out [batch, heads, d_value] and its log-normaliser [batch, heads], both float32.

    Args:
        query: one a head, [batch, heads, key]; heads a multiple of kv_heads.
        key: [batch, kv_heads, keys, key]; with `layer`, those of all layers, [layers, batch, ...].
        value: as key, of width d_value; None = the first d_value columns of key.
        distance: of each key before the query, int32 [batch, keys]; HIDDEN = not seen.
        relative_bias: added to the scores.
        scale: of the scores.
        d_value: numbers of a value.
        layer: whose keys to read, int32 []. XLA would first copy them out of the others.
        interpret: run on a CPU, step by step.

    Where no key is seen out is 0 and the log-normaliser -inf. On a mesh every device takes its rows
    and key heads.

    Cost: 2 batch heads keys (key + value) flops; keys and values read once for each tile of heads,
        4 bytes a key for its distance (8 with a table), and a float32 result a split.
    """
    batch, heads, _ = query.shape
    if layer is None:
        key, value = key[None], None if value is None else value[None]
        layer = jnp.zeros((), jnp.int32)
    kv_heads = key.shape[2]
    bucket = table = slopes = None
    if relative_bias is not None and relative_bias.table is not None:
        bucket, table = _by_bucket(distance, relative_bias)
        table = table.reshape(kv_heads, -1, table.shape[1])
    if relative_bias is not None and relative_bias.slopes is not None:
        slopes = relative_bias.slopes.astype(jnp.float32).reshape(kv_heads, -1)
    arrays = {
        "query": query.reshape(batch, kv_heads, heads // kv_heads, -1).astype(key.dtype),
        "key": key,
        "value": value,
        "distance": distance,
        "bucket": bucket,
        "table": table,
        "slopes": slopes,
        "layer": layer.astype(jnp.int32)[None],
    }
    arrays = {name: x for name, x in arrays.items() if x is not None}

    def run(*parts):
        parts = dict(zip(arrays, parts, strict=True))
        return _attend(parts, scale=scale, d_value=d_value, interpret=interpret)

    dims = [AXES[name] for name in arrays]
    out, log_normalizer = by_rows_and_heads(run, list(arrays.values()), dims, ["bh..", "bh."])
    return out.reshape(batch, heads, d_value), log_normalizer.reshape(batch, heads)


def _by_bucket(distance: jax.Array, bias: DistanceBias) -> tuple[jax.Array, jax.Array]:
    """Returns the column of each key in a table whose last column adds nothing, and the table."""
    assert bias.table is not None
    n_buckets = bias.table.shape[1]
    clipped = jnp.maximum(distance, 0)
    if bias.max_distance:
        bucket = relative_bucket(clipped, n_buckets, bias.max_distance)
    else:
        bucket = jnp.minimum(clipped, n_buckets)
    table = jnp.pad(bias.table.astype(jnp.float32), [(0, 0), (0, 1)])
    return bucket.astype(jnp.int32), table


def _attend(arrays: dict[str, jax.Array], *, scale: float, d_value: int, interpret: bool):
    """The same for the rows and heads of one device: out [batch, kv_heads, group, d_value]."""
    batch, kv_heads, group, d_key = arrays["query"].shape
    n_keys = arrays["key"].shape[3]
    tiles = tiling(d_key, d_value, group, arrays["key"].dtype)
    head_tiles, key_tiles = pl.cdiv(group, tiles.heads), pl.cdiv(n_keys, tiles.keys)
    n_heads = head_tiles * tiles.heads
    n_splits = max(1, min(PROGRAMS // (batch * kv_heads * head_tiles), key_tiles))
    arrays = arrays | {"tiles": _visible_tiles(arrays["distance"], tiles.keys)}
    for name in {"query", "table", "slopes"} & set(arrays):
        missing = [(0, n_heads - group if letter == "g" else 0) for letter in AXES[name]]
        arrays[name] = jnp.pad(arrays[name], missing)

    def place(row_head, head_tile, split):
        row, head = jax.lax.div(row_head, kv_heads), jax.lax.rem(row_head, kv_heads)
        return {"b": row, "h": head, "g": head_tile, "s": split}

    def spec(axes, shape, tiled=()):  # one row and key head, and all of what the kernel cuts itself
        block = [None if axis in "bhs" else n for axis, n in zip(axes, shape, strict=True)]
        block = [tiles.heads if axis in tiled else n for axis, n in zip(axes, block, strict=True)]

        def index(*ids):
            at = place(*ids)
            return tuple(at[a] if a in "bhs" or a in tiled else 0 for a in axes)

        return pl.BlockSpec(tuple(block), index)

    sizes = (batch, kv_heads, n_splits, n_heads)
    results = {"bhsg.": (*sizes, d_value), "bhsg": sizes}
    setup = _Setup(tiles, n_splits, n_keys, d_key, d_value, scale, interpret)
    call = pl.pallas_call(
        functools.partial(_kernel, tuple(arrays), setup),
        grid=(batch * kv_heads, head_tiles, n_splits),
        in_specs=[spec(AXES[name], x.shape) for name, x in arrays.items()],
        out_specs=[spec(axes, shape, tiled="g") for axes, shape in results.items()],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results.values()],
        compiler_params=plt.CompilerParams(num_warps=tiles.n_warps, num_stages=tiles.n_stages),
        interpret=interpret,
        name="flash_decoding",
    )
    out, log_normalizer = quietly(call, *arrays.values())
    out, log_normalizer = _merge(out, log_normalizer)
    return out[:, :, :group], log_normalizer[:, :, :group]


@dataclasses.dataclass(frozen=True)
class _Setup:
    tiles: Tiling
    n_splits: int
    n_keys: int
    d_key: int
    d_value: int
    scale: float
    is_exact: bool  # float32 products in full, as only the interpreter has them

    @property
    def value_chunks(self) -> tuple[tuple[int, int], ...]:
        """First column and width of the arrays that a value is."""
        return chunks(0, self.d_value)

    @property
    def key_chunks(self) -> tuple[tuple[int, int], ...]:
        """The same of a key; they begin with those of a value, which may be part of it."""
        if self.d_key < self.d_value:
            return chunks(0, self.d_key)
        return (*self.value_chunks, *chunks(self.d_value, self.d_key))


def chunks(first: int, end: int) -> tuple[tuple[int, int], ...]:
    """Returns starts and widths, powers of two up to MAX_CHUNK, that make up [first, end).

    >>> chunks(0, 576)
    ((0, 512), (512, 64))
    """
    parts = []
    while first < end:
        width = min(MAX_CHUNK, 1 << ((end - first).bit_length() - 1))
        parts.append((first, width))
        first += width
    return tuple(parts)


def _visible_tiles(distance: jax.Array, tile: int) -> jax.Array:
    """Returns the first tile with a visible key and the end of the last one, int32 [batch, 2]."""
    n_keys = distance.shape[1]
    index, seen = jnp.arange(n_keys), distance != HIDDEN
    first = jnp.min(jnp.where(seen, index, n_keys), axis=1) // tile
    end = (jnp.max(jnp.where(seen, index, -1), axis=1) + tile) // tile
    return jnp.stack([jnp.minimum(first, end), end], axis=1).astype(jnp.int32)


def _kernel(names, setup: _Setup, *refs):
    """One tile of heads against one split of the tiles of keys."""
    ref = dict(zip((*names, "out", "log_normalizer"), refs, strict=True))
    tiles, head = setup.tiles, pl.program_id(1) * setup.tiles.heads
    heads = pl.ds(head, tiles.heads)
    first, end, layer = ref["tiles"][0], ref["tiles"][1], ref["layer"][0]
    share = jax.lax.div(end - first + setup.n_splits - 1, setup.n_splits)
    begin = jnp.minimum(first + pl.program_id(2) * share, end)
    end = jnp.minimum(begin + share, end)
    precision = jax.lax.Precision.HIGHEST if setup.is_exact else None
    dot = functools.partial(plt.dot, precision=precision)
    query = [plt.load(ref["query"].at[heads, pl.ds(*chunk)]) for chunk in setup.key_chunks]
    slopes = LOG2_E * plt.load(ref["slopes"].at[heads]) if "slopes" in ref else None

    def add_tile(number, carry):
        sums, largest, total = carry
        start = number * tiles.keys
        slots = pl.ds(start, tiles.keys)
        seen = None
        if setup.n_keys % tiles.keys:
            seen = start + jnp.arange(tiles.keys) < setup.n_keys

        def load(name, chunk):
            view = ref[name].at[layer, slots, pl.ds(*chunk)]
            if seen is None:
                return plt.load(view)
            return plt.load(view, mask=jnp.broadcast_to(seen[:, None], view.shape), other=0)

        def load_places(name, other):
            if seen is None:
                return plt.load(ref[name].at[slots])
            return plt.load(ref[name].at[slots], mask=seen, other=other)

        distance = load_places("distance", HIDDEN)
        keys = [load("key", chunk) for chunk in setup.key_chunks]
        scores = jnp.zeros((tiles.heads, tiles.keys), jnp.float32)
        for part, key in zip(query, keys, strict=True):
            scores += dot(part, key, trans_b=True)
        scores *= setup.scale * LOG2_E
        if slopes is not None:
            scores -= slopes[:, None] * distance.astype(jnp.float32)[None, :]
        if "table" in ref:
            row = head + jnp.arange(tiles.heads)[:, None]
            column = load_places("bucket", 0)[None, :]
            place = tuple(jnp.broadcast_to(i, scores.shape) for i in (row, column))
            scores += LOG2_E * plt.load(ref["table"].at[place])
        scores = jnp.where((distance != HIDDEN)[None, :], scores, -jnp.inf)

        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
        safe = jnp.where(new_largest == -jnp.inf, 0.0, new_largest)
        weights, kept = jnp.exp2(scores - safe[:, None]), jnp.exp2(largest - safe)
        total = total * kept + jnp.sum(weights, axis=1)
        values = keys
        if "value" in ref:
            values = [load("value", chunk) for chunk in setup.value_chunks]
        sums = tuple(
            part * kept[:, None] + dot(weights.astype(value.dtype), value)
            for part, value in zip(sums, values, strict=False)
        )
        return sums, new_largest, total

    start = (
        tuple(jnp.zeros((tiles.heads, width), jnp.float32) for _, width in setup.value_chunks),
        jnp.full((tiles.heads,), -jnp.inf, jnp.float32),
        jnp.zeros((tiles.heads,), jnp.float32),
    )
    sums, largest, total = jax.lax.fori_loop(begin, end, add_tile, start)
    safe_total = jnp.where(total > 0, total, 1.0)
    for part, chunk in zip(sums, setup.value_chunks, strict=True):
        plt.store(ref["out"].at[:, pl.ds(*chunk)], part / safe_total[:, None])
    # In nats; -inf where nothing was seen, since largest is.
    plt.store(ref["log_normalizer"].at[:], (largest + jnp.log2(safe_total)) / LOG2_E)


def _merge(out: jax.Array, log_normalizer: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merges splits, axis 2 of [batch, kv_heads, splits, heads, value] and of the normalisers."""
    total = jax.nn.logsumexp(log_normalizer, axis=2, keepdims=True)
    safe = jnp.where(jnp.isfinite(total), total, 0.0)
    shares = jnp.exp(log_normalizer - safe)
    return jnp.sum(shares[..., None] * out, axis=2), total[:, :, 0]
