"""What the Triton kernels of vector-quantised attention share: tiles, loads, masked scores.

Scores are in base 2: scale log2(e) q . k + log2(e) B, plus log2 n for codes, so that the kernels
use exp2 alone. Masked scores are -inf. The functions here run inside kernels, except those that
describe a call (`Sizes`, `Setup`, `specs`).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from longctx_jax.ops.vq.blocks import Rules
from longctx_jax.ops.vq.table import NO_DOCUMENT, PADDING

LOG2_E = 1.4426950408889634
MIN_WIDTH = 16  # of Triton's products
# Axes of every array: n blocks, b batch, h key heads, g query heads of one; "." = rows or columns.
AXES = {
    "query": "nbhg..",
    "bias": "nbhg.",  # [block * distances] of each block
    "key": "bh..",
    "value": "bh..",
    "codebook": "h..",
    "mean": "nbh..",
    "log_count": "nbh.",
    "query_document": "nb.",
    "key_document": "b.",
    "table_document": "nb.",
    "first_key": "nb.",
    "out": "nbhg..",
    "log_normalizer": "nbhg.",
    "row_term": "nbhg.",
}


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one kernel is cut up.

    Attributes:
        rows: queries a tile.
        columns: keys or codes a tile.
        value: value columns a tile.
        n_warps: warps a program.
        n_stages: depth of the software pipeline of its loads.
    """

    rows: int
    columns: int
    value: int
    n_warps: int
    n_stages: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Lengths of the padded arrays of a call; n_distances 0 = no bias."""

    n_blocks: int
    batch: int
    kv_heads: int
    group: int
    block: int
    d_key: int
    d_value: int
    n_keys: int
    n_codes: int
    n_distances: int

    @property
    def before(self) -> int:
        """Keys before the first block."""
        return self.n_keys - self.n_blocks * self.block


@dataclasses.dataclass(frozen=True)
class Setup:
    """The static facts a kernel is built from."""

    rules: Rules
    sizes: Sizes
    tiles: Tiling
    is_exact: bool

    @property
    def row_tiles(self) -> int:
        """Tiles of queries a block."""
        return pl.cdiv(self.sizes.block, self.tiles.rows)

    @property
    def value_tiles(self) -> int:
        """Tiles of value columns; `pad_columns` makes them whole."""
        return self.sizes.d_value // self.tiles.value

    @property
    def code_tiles(self) -> int:
        """Tiles of codes."""
        return pl.cdiv(self.sizes.n_codes, self.tiles.columns)

    @property
    def row_limit(self) -> int | None:
        """Rows of a block, None where tiles end with it."""
        return self.sizes.block if self.sizes.block % self.tiles.rows else None

    @property
    def key_limit(self) -> int | None:
        """Keys, None where no tile reaches past them."""
        sizes, columns = self.sizes, self.tiles.columns
        return sizes.n_keys if sizes.block % columns or sizes.n_keys % columns else None

    @property
    def code_limit(self) -> int | None:
        """Codes, None where tiles end with them."""
        return self.sizes.n_codes if self.sizes.n_codes % self.tiles.columns else None

    @property
    def dot(self) -> Callable[..., jax.Array]:
        """Products: of float32 in TF32 as XLA's default is, exact in the interpreter."""
        return functools.partial(
            plt.dot, precision=jax.lax.Precision.HIGHEST if self.is_exact else None
        )


def specs(arrays: dict[str, Any], place: Callable[..., dict[str, Any]]) -> list[pl.BlockSpec]:
    """Returns block specs: axes that `place(*program_ids)` names are at an index, others whole."""
    names = place(0, 0, 0).keys()

    def spec(name, array):
        axes = AXES[name]
        shape = tuple(None if a in names else n for a, n in zip(axes, array.shape, strict=True))

        def index(*ids):
            at = place(*ids)
            return tuple(at.get(axis, 0) for axis in axes)

        return pl.BlockSpec(shape, index)

    return [spec(name, array) for name, array in arrays.items()]


def load(ref, at: tuple, start, n: int, limit: int | None, columns: Any = None, other: Any = 0):
    """Returns n rows of ref[at] from start on, `other` in those at or past the limit."""
    index = (*at, pl.ds(start, n))
    view = ref.at[index if columns is None else (*index, columns)]
    if limit is None:
        return plt.load(view)
    mask = start + jnp.arange(n) < limit
    if columns is not None:
        mask = jnp.broadcast_to(mask[:, None], view.shape)
    return plt.load(view, mask=mask, other=other)


def store(ref, at: tuple, start, x, limit: int | None, columns: Any = None) -> None:
    """Writes rows of ref[at] from start on, none at or past the limit."""
    index = (*at, pl.ds(start, x.shape[0]))
    view = ref.at[index if columns is None else (*index, columns)]
    mask = None
    if limit is not None:
        mask = start + jnp.arange(x.shape[0]) < limit
        if columns is not None:
            mask = jnp.broadcast_to(mask[:, None], x.shape)
    plt.store(view, x.astype(ref.dtype), mask=mask)


class Rows(NamedTuple):
    """A tile of queries of one block."""

    at: tuple  # index of the block and the head into arrays of queries; () where the ref has it
    block: Any  # number of the block
    start: Any  # first row within the block
    local: jax.Array  # int32 [rows], row within the block
    position: jax.Array  # int32 [rows], the key index of the query's own key
    document: jax.Array  # int32 [rows]


def take_rows(ref, at: tuple, document_at: tuple, step, setup: Setup) -> Rows:
    """Returns tile number `step` of the blocks' tiles."""
    block, tile = jax.lax.div(step, setup.row_tiles), jax.lax.rem(step, setup.row_tiles)
    start = tile * setup.tiles.rows
    local = start + jnp.arange(setup.tiles.rows)
    position = setup.sizes.before + block * setup.sizes.block + local
    options = {"limit": setup.row_limit, "other": PADDING}
    document = load(ref["query_document"], document_at, start, setup.tiles.rows, **options)
    return Rows(at, block, start, local, position, document)


def code_scores(ref, at: tuple, rows: Rows, query, start, word, setup: Setup, *, transposed=False):
    """Returns scores of queries and the codes from start on.

    Args:
        ref: refs by name.
        at: index of the block into arrays of tables.
        rows: the queries' tile.
        query: its queries.
        start: first code.
        word: the codewords from there on.
        setup: of the kernel.
        transposed: codes before queries.
    """
    fill = {"limit": setup.code_limit, "other": -jnp.inf}
    log_count = load(ref["log_count"], at, start, setup.tiles.columns, **fill)
    sees = rows.document == ref["table_document"][(*at, 0)]
    of_row, of_code = _axes(transposed)
    score = _product(query, word, setup, transposed) + of_code(log_count)
    return jnp.where(of_row(sees), score, -jnp.inf)


def key_scores(ref, rows: Rows, query, start, key, document, setup: Setup, *, transposed=False):
    """Returns scores of queries and the keys from start on, and the distances between them.

    Args:
        ref: refs by name; the bias is read skewed, row t and key s at column t - s + const.
        rows: the queries' tile.
        query: its queries.
        start: first key.
        key: keys from there on.
        document: of those keys.
        setup: of the kernel.
        transposed: keys before queries.
    """
    index = start + jnp.arange(setup.tiles.columns)
    of_row, of_key = _axes(transposed)
    distance = of_row(rows.position) - of_key(index)
    visible = (distance >= 0) & (of_row(rows.document) == of_key(document))
    if not setup.rules.use_table:
        visible &= distance <= setup.rules.window_len
    bias = None
    if setup.sizes.n_distances:
        # Before the product: after it, the places cost registers that the product holds. Read with
        # keys along lanes, where rows are contiguous, then turned.
        upright = rows.position[:, None] - index[None, :] if transposed else distance
        at, listed = bias_place(rows, index, upright, setup)
        bias = plt.load(ref["bias"].at[at], mask=listed, other=0.0)
        bias = bias.T if transposed else bias
        bias = LOG2_E * bias.astype(jnp.float32)
    score = _product(query, key, setup, transposed)
    score = score if bias is None else score + bias
    return jnp.where(visible, score, -jnp.inf), distance


def bias_place(rows: Rows, index, distance, setup: Setup):
    """Returns places of rows and keys in a block's flat bias, and which of them it lists.

    Row t and key s stand at t distances + (t - s + const): one number a row minus one a key.

    Args:
        rows: a tile of queries.
        index: of the keys.
        distance: between them, [rows, keys].
        setup: of the kernel.
    """
    n_distances = setup.sizes.n_distances
    # One comparison: a negative distance is a large unsigned one.
    listed = distance.astype(jnp.uint32) < n_distances
    if setup.row_limit is not None:
        listed &= (rows.local < setup.row_limit)[:, None]
    place = (rows.local * n_distances + rows.position)[:, None] - index[None, :]
    return (*(jnp.broadcast_to(i, place.shape) for i in rows.at), place), listed


def key_range(ref, rows: Rows, setup: Setup):
    """Returns the first key of the tiles that a tile of queries may see, and how many tiles.

    Tiles start at multiples of their length from the block's first key on. Those before the first
    key of the block's documents, in the future, or, without a table, beyond the window are left
    out.
    """
    rules, sizes, tiles = setup.rules, setup.sizes, setup.tiles
    origin = rows.block * sizes.block
    lowest = jnp.maximum(ref["first_key"][0], origin)
    if not rules.use_table:
        lowest = jnp.maximum(lowest, origin + sizes.before + rows.start - rules.window_len)
    first = origin + jax.lax.div(lowest - origin, tiles.columns) * tiles.columns
    end = origin + sizes.before + jnp.minimum(rows.start + tiles.rows, sizes.block)
    return first, pl.cdiv(jnp.maximum(end - first, 0), tiles.columns)


def load_key_documents(ref, start, setup: Setup):
    """Returns the documents of the keys from start on, NO_DOCUMENT past the last one."""
    options = {"limit": setup.key_limit, "other": NO_DOCUMENT}
    return load(ref["key_document"], (), start, setup.tiles.columns, **options)


def any_of(mask):
    """Returns whether any element is true."""
    return jnp.max(mask.astype(jnp.int32)) > 0


def dot_over_values(left: Callable, right: Callable, shape: tuple[int, int], setup: Setup):
    """Returns left @ right^T over all value columns; both load the tile of columns they are given.

    A loop over tiles, so values of any width fit.
    """
    width = setup.tiles.value
    if setup.value_tiles == 1:
        columns = pl.ds(0, width)
        return setup.dot(left(columns), right(columns), trans_b=True)

    def add(i, total):
        columns = pl.ds(i * width, width)
        return total + setup.dot(left(columns), right(columns), trans_b=True)

    return jax.lax.fori_loop(0, setup.value_tiles, add, jnp.zeros(shape, jnp.float32))


def pad_columns(x: jax.Array, unit: int) -> jax.Array:
    """Returns x with zeros after its last axis, up to a multiple of unit."""
    missing = -x.shape[-1] % unit
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _axes(transposed: bool):
    def leading(x):
        return x[:, None]

    def trailing(x):
        return x[None, :]

    return (trailing, leading) if transposed else (leading, trailing)


def _product(query, key, setup: Setup, transposed: bool):
    left, right = (key, query) if transposed else (query, key)
    return setup.dot(left, right, trans_b=True) * (setup.rules.scale * LOG2_E)
