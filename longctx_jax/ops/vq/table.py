"""The compressive cache: how often each code occurred, and the mean of the values filed under it.

For a document's tokens j that left the window, with codes z_j,

    n[s] = #{j : z_j = s}          m[s] = mean of v_j over those j

Keys with one code get one score, so a softmax over all of them is a softmax over S codes with
n[s] added in the exponent as log n[s]: the same number, regrouped. Tables form a monoid,

    (m1, n1) + (m2, n2) = ((n1 m1 + n2 m2) / (n1 + n2), n1 + n2),

in which a later document replaces an earlier one, so the tables before each block of a sequence are
a prefix sum, computed serially, by one matrix product, or by a parallel scan. Storing means keeps
every number at the scale of one value; counts are integers, exact to 2^31.

Source: Lingle (2023), arXiv 2309.16354, section 3 and appendix (the reductions).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Float, Int

NO_DOCUMENT = -1  # of empty slots, and of a table without an entry
PADDING = -2  # document of a query that is no token: equal to no key's
REDUCTIONS = ("serial", "matmul", "associative")


class Table(NamedTuple):
    """What left the window of one document, or [blocks, ...] of them."""

    mean: jax.Array  # float32 [batch, kv_heads, codes, value]
    count: jax.Array  # int32 [batch, kv_heads, codes]
    document: jax.Array  # int32 [batch]; NO_DOCUMENT = nothing filed yet


class _Sums(NamedTuple):
    """A table with sums in place of means."""

    total: jax.Array
    count: jax.Array
    document: jax.Array


def empty_table(batch: int, kv_heads: int, n_codes: int, d_value: int, dtype=jnp.float32) -> Table:
    """Returns the neutral element: nothing filed."""
    return Table(
        jnp.zeros((batch, kv_heads, n_codes, d_value), dtype),
        jnp.zeros((batch, kv_heads, n_codes), jnp.int32),
        jnp.full((batch,), NO_DOCUMENT, jnp.int32),
    )


def merge_tables(left: Table, right: Table) -> Table:
    """Returns the table of two runs of tokens, `right` the later one; associative.

    Where the runs end in different documents, the later document's entries alone remain.
    """
    document = jnp.maximum(left.document, right.document)
    left_count = _of_document(left.count, left.document, document)
    right_count = _of_document(right.count, right.document, document)
    count = left_count + right_count
    whole = jnp.maximum(count, 1).astype(left.mean.dtype)[..., None]
    mean = left.mean * (left_count[..., None] / whole) + right.mean * (
        right_count[..., None] / whole
    )
    return Table(mean.astype(left.mean.dtype), count, document)


def file_tokens(
    table: Table,
    codes: Int[Array, "batch kv_heads tokens"],
    value: Float[Array, "batch kv_heads tokens value"],
    documents: Int[Array, "batch tokens"],
) -> Table:
    """Returns the table after filing consecutive tokens, at the cost of adding up their values."""
    return _add(table, _sum_block(codes, value, documents, table.count.shape[-1]))


def file_token(
    table: Table,
    codes: Int[Array, "batch kv_heads"],
    value: Float[Array, "batch kv_heads value"],
    document: Int[Array, " batch"],
) -> Table:
    """Returns the table after filing one token (none where document is NO_DOCUMENT).

    The same as `file_tokens`, but touches one row of the means where that touches all.
    """
    last = jnp.maximum(table.document, document)
    # Rows of codes that no longer count keep a mean that nothing reads.
    count = _of_document(table.count, table.document, last)
    place = jnp.arange(codes.shape[0])[:, None], jnp.arange(codes.shape[1])[None], codes
    kept = count[place]
    new = kept + (document != NO_DOCUMENT)[:, None].astype(kept.dtype)
    whole = jnp.maximum(new, 1).astype(table.mean.dtype)[..., None]
    added = value.astype(table.mean.dtype) * (new - kept)[..., None].astype(table.mean.dtype)
    mean = table.mean[place] * (kept[..., None].astype(whole.dtype) / whole) + added / whole
    # A code that was not filed keeps its row: kept / whole is 1, or the row counts for nothing.
    return Table(table.mean.at[place].set(mean), count.at[place].set(new), last)


def tables_before_blocks(
    table: Table,
    codes: Int[Array, "blocks batch kv_heads block"],
    value: Float[Array, "blocks batch kv_heads block value"],
    documents: Int[Array, "blocks batch block"],
    reduction: str = "serial",
) -> Table:
    """Returns the tables after 0, 1, ... blocks have been filed, leaves [blocks + 1, ...].

    Args:
        table: before the first block.
        codes: of the tokens of each block, in order.
        value: of the same tokens.
        documents: of the same tokens; NO_DOCUMENT = not a token.
        reduction: "serial": a scan; "matmul": one product over pairs of blocks, blocks^2
            codes value flops; "associative": a parallel prefix. Equal up to rounding.

    Cost: serial and associative O(blocks codes value) beside adding up the values.
    """
    assert reduction in REDUCTIONS, reduction
    n_codes = table.count.shape[-1]

    def with_first(first, rest):
        return jax.tree.map(lambda f, r: jnp.concatenate([f[None], r]), first, rest)

    if reduction == "serial":

        def step(table, block):
            codes, value, documents = block
            table = _add(table, _sum_block(codes, value, documents, n_codes))
            return table, table

        _, later = jax.lax.scan(step, table, (codes, value, documents))
        return with_first(table, later)
    sums = jax.vmap(lambda c, v, d: _sum_block(c, v, d, n_codes))(codes, value, documents)
    if reduction == "associative":
        count = jnp.maximum(sums.count, 1).astype(table.mean.dtype)[..., None]
        blocks = Table(sums.total / count, sums.count, sums.document)
        return jax.lax.associative_scan(jax.vmap(merge_tables), with_first(table, blocks))
    start = _Sums(table.mean * table.count[..., None], table.count, table.document)
    return _by_matmul(with_first(start, sums))


def _by_matmul(sums: _Sums) -> Table:
    """Means after each block as one product, with fractions [g filed by b, same document] / n."""
    document = jax.lax.cummax(sums.document, axis=0)
    n_blocks = sums.document.shape[0]
    is_filed = jnp.tri(n_blocks, dtype=bool)[..., None]
    is_filed &= document[:, None] == sums.document[None]  # [b, g, batch]
    is_filed = is_filed.astype(jnp.int32)
    count = jnp.einsum("cgb,gbhz->cbhz", is_filed, sums.count)
    whole = jnp.maximum(count, 1).astype(sums.total.dtype)
    # Divided first, so that the sums of a long stream are never formed.
    fraction = is_filed[:, :, :, None, None] / whole[:, None]
    mean = jnp.einsum(
        "cgbhz,gbhzv->cbhzv", fraction, sums.total, precision=jax.lax.Precision.HIGHEST
    )
    return Table(mean, count, document)


def _sum_block(codes, value, documents, n_codes: int) -> _Sums:
    """Sums values and counts by code over the tokens of the block's last document."""
    document = jnp.max(documents, axis=-1)
    counted = (documents == document[:, None]) & (documents != NO_DOCUMENT)
    dtype = accumulator(value)
    # A slot past the end drops the tokens that do not count.
    slots = jnp.where(counted[:, None], codes, n_codes)

    def one(slots, value):
        total = jnp.zeros((n_codes, value.shape[-1]), dtype)
        total = total.at[slots].add(value.astype(dtype), mode="drop")
        return total, jnp.zeros(n_codes, jnp.int32).at[slots].add(1, mode="drop")

    total, count = jax.vmap(jax.vmap(one))(slots, value)
    return _Sums(total, count, document)


def _add(table: Table, block: _Sums) -> Table:
    document = jnp.maximum(table.document, block.document)
    kept = _of_document(table.count, table.document, document)
    count = kept + _of_document(block.count, block.document, document)
    whole = jnp.maximum(count, 1).astype(table.mean.dtype)[..., None]
    mean = table.mean * (kept[..., None].astype(whole.dtype) / whole) + block.total / whole
    return Table(mean, count, document)


def _of_document(count, document, wanted):
    return jnp.where((document == wanted)[..., None, None], count, 0)
