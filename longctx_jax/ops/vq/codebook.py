"""The codebook: nearest code, straight-through estimator, and k-means by moving averages.

    z_j     = argmin_s |k_j - C_s|^2                    ties to the lowest s
    k_hat_j = C_{z_j} + (k_j - sg(k_j))                 value C_z, gradient of k
    n_s, m_s = how many keys code s got in an update, and their sum
    count <- gamma count + (1 - gamma) n,   sum <- gamma sum + (1 - gamma) m,   C = sum / count

The two running averages are non-gradient state; the statistics (n, m) are plain sums over tokens,
so segments, micro-batches and devices add up to one update, exactly as if they were one.

Source: Lingle (2023), arXiv 2309.16354, section 3; van den Oord et al. (2017), arXiv 1711.00937.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.products import accumulator
from longctx_jax.typing import Array, Float, Int, PRNGKey

MIN_COUNT = 0.01  # tokens an update: a code used less shrinks towards the origin ("clip")
STARTS = ("sphere", "published")
SPLIT_NOISE = 0.01  # relative size of the step that separates the two halves of a split code
DISTANCES_AT_ONCE = 2**25  # numbers; more tokens are searched in pieces


class Codebook(NamedTuple):
    """Running averages over updates; leading axes (layers) are allowed before heads."""

    sums: jax.Array  # float32 [heads, codes, key]
    counts: jax.Array  # float32 [heads, codes], tokens an update


class CodeStatistics(NamedTuple):
    """What one update needs to know about the keys it saw: sums over tokens."""

    counts: jax.Array  # float32 [heads, codes]
    sums: jax.Array  # float32 [heads, codes, key]


class Quantized(NamedTuple):
    """Keys replaced by their nearest codewords."""

    vectors: jax.Array  # [batch, seq, heads, key], value of the codeword, gradient of the key
    codes: jax.Array  # int32 [batch, seq, heads]
    squared_error: jax.Array  # [batch, seq, heads], with the gradient of the key


def search_codes(
    vectors: Float[Array, "*batch heads key"], codebook: Float[Array, "heads codes key"]
) -> Int[Array, "*batch heads"]:
    """Returns argmin_s |vector - codebook_s|^2 in plain JAX, in float32 at full precision."""
    dtype = accumulator(vectors, codebook)
    vectors, codebook = vectors.astype(dtype), codebook.astype(dtype)
    n_codes = codebook.shape[1]
    norms = jnp.sum(codebook**2, axis=-1)

    def search(x):  # [tokens, heads, key]
        product = jnp.einsum("thk,hzk->thz", x, codebook, precision=jax.lax.Precision.HIGHEST)
        distance = norms[None] - 2.0 * product  # |x|^2 is the same for all codes
        least = jnp.min(distance, axis=-1, keepdims=True)
        # Two reductions, because an argmin is slower than both; the lowest index wins a tie.
        # NaN equals nothing: the clamp keeps the code in range.
        index = jnp.where(distance == least, jnp.arange(n_codes, dtype=jnp.int32), n_codes)
        return jnp.minimum(jnp.min(index, axis=-1), n_codes - 1)

    flat = vectors.reshape(-1, *vectors.shape[-2:])
    piece = max(1, DISTANCES_AT_ONCE // (n_codes * codebook.shape[0]))
    codes = search(flat) if len(flat) <= piece else _in_pieces(search, flat, piece)
    return codes.reshape(vectors.shape[:-1])


def _in_pieces(search, x, piece: int):
    n_pieces = -(-len(x) // piece)
    padded = jnp.pad(x, [(0, n_pieces * piece - len(x)), (0, 0), (0, 0)])
    codes = jax.lax.map(search, padded.reshape(n_pieces, piece, *x.shape[1:]))
    return codes.reshape(n_pieces * piece, -1)[: len(x)]


def look_up(
    codebook: Float[Array, "heads codes key"], codes: Int[Array, "*batch heads"]
) -> Float[Array, "*batch heads key"]:
    """Returns the codewords of the codes."""
    return codebook[jnp.arange(codebook.shape[0]), codes]


def quantize(
    vectors: Float[Array, "*batch heads key"],
    codebook: Float[Array, "heads codes key"],
    codes: Int[Array, "*batch heads"],
) -> Quantized:
    """Returns the vectors' codewords with straight-through gradients, and their squared errors.

    The codewords get no gradient; the squared error moves the vector towards its codeword.
    """
    dtype = accumulator(vectors, codebook)
    word = look_up(jax.lax.stop_gradient(codebook).astype(dtype), codes)
    wide = vectors.astype(dtype)
    squared_error = jnp.sum((wide - word) ** 2, axis=-1)
    straight_through = word.astype(vectors.dtype) + (vectors - jax.lax.stop_gradient(vectors))
    return Quantized(straight_through, codes, squared_error)


def code_statistics(
    vectors: Float[Array, "batch seq heads key"],
    codes: Int[Array, "batch seq heads"],
    n_codes: int,
    weights: Float[Array, "batch seq"] | None = None,
) -> CodeStatistics:
    """Returns how often each code was chosen and the sum of its vectors, without gradients.

    Args:
        vectors: before quantisation.
        codes: of the vectors.
        n_codes: codewords a head.
        weights: what a token counts, 0 for padding; None = 1.

    Cost: batch seq heads key additions.
    """
    dtype = accumulator(vectors)
    vectors = jax.lax.stop_gradient(vectors).astype(dtype)
    heads, width = vectors.shape[-2:]
    counted = jnp.ones(codes.shape, dtype)
    if weights is not None:
        counted = counted * weights[..., None].astype(dtype)
    slots = (jnp.arange(heads)[None, None] * n_codes + codes).reshape(-1)
    counts = jnp.zeros(heads * n_codes, dtype).at[slots].add(counted.reshape(-1))
    added = jnp.where(counted[..., None] == 0, 0, vectors * counted[..., None])
    sums = jnp.zeros((heads * n_codes, width), dtype).at[slots].add(added.reshape(-1, width))
    return CodeStatistics(counts.reshape(heads, n_codes), sums.reshape(heads, n_codes, width))


def init_codebook(
    key: PRNGKey, n_heads: int, n_codes: int, d_key: int, start: str = "sphere"
) -> Codebook:
    """Returns the codebook before the first update; every count is 1.

    "sphere": random directions of length d_key^(1/4), where the keys of this model lie.
    "published": normal with variance 1 / (heads codes), far inside that sphere; early on a handful
    of codes then take all keys.
    """
    sums = jax.random.normal(key, (n_heads, n_codes, d_key), jnp.float32)
    if start == "sphere":
        sums = sums * (d_key**0.25 / jnp.linalg.norm(sums, axis=-1, keepdims=True))
    else:
        sums = sums * (n_heads * n_codes) ** -0.5
    return Codebook(sums, jnp.ones((n_heads, n_codes), jnp.float32))


def codewords(codebook: Codebook) -> Float[Array, "*layers heads codes key"]:
    """Returns C, without a gradient: sums / counts, safe for codes that nothing uses.

    sums / max(count, MIN_COUNT), as published: a code unused for hundreds of updates shrinks to
    the origin, where it catches keys that no codeword is near.
    """
    sums, counts = jax.lax.stop_gradient((codebook.sums, codebook.counts))
    return sums / jnp.maximum(counts, MIN_COUNT)[..., None]


def update_codebook(codebook: Codebook, statistics: CodeStatistics, *, decay: float) -> Codebook:
    """Returns the codebook after one step of moving-average k-means.

    Args:
        codebook: running averages.
        statistics: summed over all tokens of the update.
        decay: gamma, what the averages keep of their past.
    """
    keep, take = decay, 1.0 - decay
    return Codebook(
        keep * codebook.sums + take * statistics.sums,
        keep * codebook.counts + take * statistics.counts,
    )


def reseed_dead_codes(codebook: Codebook, key: PRNGKey, below: float) -> Codebook:
    """Returns the codebook with each dead code replaced by half of a busy one.

    The i-th least used code, if its count is below the limit, takes half the mass of the i-th most
    used one, moved by SPLIT_NOISE in a random direction and its opposite, so the pair's mean and
    mass stay what they were (the split of Linde, Buzo and Gray 1980). Needs nothing but the running
    averages, so it is the same on every device.

    Args:
        codebook: leading axes (layers) allowed.
        key: of the directions.
        below: tokens an update.
    """
    counts, sums = codebook.counts, codebook.sums
    order = jnp.argsort(counts, axis=-1)  # least used first
    half = counts.shape[-1] // 2
    dead, donor = order[..., :half], order[..., ::-1][..., :half]

    def take(x, index):
        return jnp.take_along_axis(x, index, axis=-1)

    def take_rows(x, index):
        return jnp.take_along_axis(x, index[..., None], axis=-2)

    replaced = (take(counts, dead) < below) & (take(counts, donor) > 2.0 * below)
    mass = 0.5 * take(counts, donor)
    mean = take_rows(sums, donor) / jnp.maximum(take(counts, donor), MIN_COUNT)[..., None]
    direction = jax.random.normal(key, mean.shape, mean.dtype)
    size = SPLIT_NOISE * jnp.linalg.norm(mean, axis=-1, keepdims=True)
    step = size * direction / (jnp.linalg.norm(direction, axis=-1, keepdims=True) + 1e-30)

    def put(x, index, new, mask):
        old = take(x, index)
        return jnp.put_along_axis(x, index, jnp.where(mask, new, old), axis=-1, inplace=False)

    def put_rows(x, index, new):
        old = take_rows(x, index)
        new = jnp.where(replaced[..., None], new, old)
        return jnp.put_along_axis(
            x, jnp.broadcast_to(index[..., None], new.shape), new, axis=-2, inplace=False
        )

    counts = put(put(counts, dead, mass, replaced), donor, mass, replaced)
    sums = put_rows(sums, dead, mass[..., None] * (mean - step))
    sums = put_rows(sums, donor, mass[..., None] * (mean + step))
    return Codebook(sums, counts)


def codebook_report(codebook: Codebook, dead_below: float = 1.0) -> dict[str, jax.Array]:
    """Returns perplexity of code use, share of dead codes, codeword norm, each [*layers, heads].

    Perplexity is exp of the entropy of the running counts: how many codes are in use, 1 .. codes. A
    code is dead when its count is below dead_below tokens an update.
    """
    counts = jnp.maximum(codebook.counts, 0.0)
    share = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1e-30)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0), -1)
    norms = jnp.linalg.norm(codewords(codebook), axis=-1)
    return {
        "perplexity": jnp.exp(entropy),
        "dead_fraction": jnp.mean(counts < dead_below, axis=-1),
        "codeword_norm": jnp.mean(norms, axis=-1),
    }
