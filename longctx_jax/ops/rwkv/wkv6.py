"""The matrix memory of RWKV-6, with a decay per token and channel, by tokens and by chunks.

    y_t = r_t^T ( S + diag(u) k_t v_t^T ),    S <- diag(e^{g_t}) S + k_t v_t^T      S: [key, value]

By chunks, with G the sum of g up to and including a token and E = G - g the sum before it:

    y_i = sum_{j<i} [ sum_k r_ik k_jk e^{E_ik - G_jk} ] v_j + (r_i u . k_i) v_i + (r_i e^{E_i}) S

e^{E_i} e^{-G_j} as two factors would overflow for strong decays. So a chunk is cut into short runs:
within a run the difference is formed for each pair of tokens, and between runs both factors are
measured from the border R at the start of the later run, e^{E_i - R} e^{R - G_j}: no exponent is
ever above 0, and an underflow to 0 is the right answer.

Source: Peng et al. (2024), arXiv 2404.05892; the two levels: Yang et al. (2023), arXiv 2312.06635.
"""

import functools

import jax
import jax.numpy as jnp

from longctx_jax.ops.checked import checked
from longctx_jax.ops.decay.chunks import join, split
from longctx_jax.ops.decay.powers import FORGETS_ALL, LogSums, log_sums
from longctx_jax.ops.dispatch import Implementation
from longctx_jax.ops.products import accumulator, product
from longctx_jax.ops.quarantine import find_poison, is_bad
from longctx_jax.ops.recurrence import choose_form, is_one_step, require_chunk_len, time_first
from longctx_jax.typing import Array, Bool, Float

CHUNK_LEN = 32  # tokens
RUN_LEN = 8  # tokens, at most: pairs within a run are not matrix products


@checked
def wkv6(
    receptance: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, "batch seq heads key"],
    bonus: Float[Array, "heads key"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq"] | None = None,
    implementation: str = "auto",
    chunk_len: int = CHUNK_LEN,
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns what each token reads from the memory, and the memory after the last token.

    Args:
        receptance: what reads (the query); not scaled by the key width.
        key: where a token writes.
        value: what it writes.
        log_decay: g <= 0, log of what the memory keeps when the token is written; -inf = nothing.
        bonus: u, the weight of the current token, which is written only after the reading.
        state: S before the first token; None = zeros.
        reset: True where a token starts a new document: what came before is forgotten.
        implementation: "auto", "recurrent" or "chunked"; all give the same result.
        chunk_len: tokens a chunk; best a multiple of 8.

    Returns:
        out in the dtype of value; S in float32, or float64 for float64 input.

    Raises:
        ValueError: unknown implementation, chunk_len < 1, or no token.

    Cost a head and token: 6 key value flops recurrent; 2 c (key + value) + 4 key value in products
    plus key (8 + c / 8) exponentials chunked, with c = chunk_len. The backward pass keeps one
    state a chunk, where the recurrent form keeps one a token.
    """
    require_chunk_len("wkv6", chunk_len)
    run = choose_form("wkv6", FORMS, implementation, key.shape[1])
    dtype = accumulator(receptance, key, value)
    if state is None:
        batch, _, heads, d_key = key.shape
        state = jnp.zeros((batch, heads, d_key, value.shape[-1]), dtype)
    poison = None
    if reset is not None:
        bad = is_bad(receptance) | is_bad(key) | is_bad(value)
        poison = find_poison(bad | is_bad(log_decay, allow_minus_inf=True), reset, state)
        tokens = (receptance, key, value, log_decay)
        receptance, key, value, log_decay = (poison.clean(x) for x in tokens)
        state = poison.clean_state(state)
    assert state is not None
    wide = (log_decay.astype(dtype), bonus.astype(dtype), state.astype(dtype))
    out, last = run(receptance, key, value, *wide, reset, chunk_len)
    out = out.astype(value.dtype)
    return (out, last) if poison is None else (poison.spread(out), poison.spread_state(last))


def _recurrent(receptance, key, value, log_decay, bonus, state, reset, chunk_len):
    """The definition: a scan over tokens."""
    del chunk_len
    tokens = [time_first(x).astype(state.dtype) for x in (receptance, key, value, log_decay)]
    resets = None if reset is None else time_first(reset)

    def step(state, token):
        receptance, key, value, log_decay, reset = token
        if reset is not None:
            state = jnp.where(reset[:, None, None, None], 0, state)
        written = key[..., :, None] * value[..., None, :]
        out = jnp.einsum("bhk,bhkv->bhv", receptance, state + bonus[None, ..., None] * written)
        return jnp.exp(log_decay)[..., None] * state + written, out

    state, out = jax.lax.scan(step, state, (*tokens, resets))
    return time_first(out), state


def _chunked(receptance, key, value, log_decay, bonus, state, reset, chunk_len):
    """Matrix products within a chunk, a scan over chunks that carries S."""
    seq = key.shape[1]
    if seq < chunk_len:  # one chunk, of whole runs
        chunk_len = seq if seq < RUN_LEN else -(-seq // RUN_LEN) * RUN_LEN
    run_len = max(n for n in range(1, RUN_LEN + 1) if chunk_len % n == 0)

    def by_chunk(x):  # [batch, seq, heads, width] -> [n_chunks, batch, heads, chunk, width]
        return jnp.moveaxis(split(x, chunk_len), (1, 2), (0, 3))

    # Below FORGETS_ALL nothing is left to float32 precision; a sum with -inf would leave nan.
    log_decay = jnp.maximum(log_decay, FORGETS_ALL)
    tokens = [by_chunk(x) for x in (receptance, key, value, log_decay)]
    document = None
    if reset is not None:  # number of document starts in the chunk, the token's own included
        starts = split(reset, chunk_len).astype(jnp.int32)
        document = jnp.moveaxis(jnp.cumsum(starts, axis=2), 1, 0)
    walk = jax.checkpoint(functools.partial(_chunk, bonus=bonus, run_len=run_len))
    state, out = jax.lax.scan(walk, state, (*tokens, document))
    return join(jnp.moveaxis(out, (0, 3), (1, 2)), seq), state


def _chunk(state, tokens, *, bonus, run_len):
    """Returns S after the chunk and [batch, heads, chunk, value] read in it."""
    receptance, key, value, log_decay, document = tokens
    dtype, narrow = state.dtype, value.dtype
    sums = _sums_from_zero(log_decay)
    before, upto, end = (
        LogSums(*(x[:, :, part] for x in sums))
        for part in (slice(None, -1), slice(1, None), slice(-1, None))
    )
    read = receptance * jnp.exp(before.coarse + before.fine)
    write = key * jnp.exp(end - upto)
    keep = jnp.exp(end.coarse + end.fine)  # [batch, heads, 1, key]
    scores = _scores(receptance, key, sums, run_len, dtype)
    if document is not None:
        is_same = document[:, :, None] == document[:, None, :]
        scores = jnp.where(is_same[:, None], scores, 0)
        is_old = document == 0  # still the document of the token before the chunk
        read = jnp.where(is_old[:, None, :, None], read, 0)
        is_last = document == document[:, -1:]
        write = jnp.where(is_last[:, None, :, None], write, 0)
        keep = jnp.where(is_old[:, -1][:, None, None, None], keep, 0)

    now = jnp.sum(receptance * bonus[None, :, None] * key, axis=-1, keepdims=True, dtype=dtype)
    out = now * value
    out += product("bhts,bhsv->bhtv", scores.astype(narrow), value, dtype=dtype)
    out += product("bhtk,bhkv->bhtv", read.astype(narrow), state.astype(narrow), dtype=dtype)
    written = product("bhsk,bhsv->bhkv", write.astype(narrow), value, dtype=dtype)
    return jnp.swapaxes(keep, -1, -2) * state + written, out


def _sums_from_zero(log_decay: jax.Array) -> LogSums:
    """Returns 0, g_0, g_0 + g_1, ... over the chunk, [batch, heads, chunk + 1, key]."""
    pad = [(0, 0)] * 2 + [(1, 0), (0, 0)]
    sums = log_sums(jnp.swapaxes(jnp.pad(log_decay, pad), -1, -2))
    return LogSums(*(jnp.swapaxes(x, -1, -2) for x in sums))


def _scores(receptance, key, sums: LogSums, run_len: int, dtype) -> jax.Array:
    """Returns sum_k r_ik k_jk e^{E_ik - G_jk} for j < i, else 0: [batch, heads, chunk, chunk]."""
    batch, heads, chunk_len, d_key = key.shape
    n_runs = chunk_len // run_len

    def runs(x):
        return x.reshape(batch, heads, n_runs, run_len, d_key)

    before = LogSums(*(runs(x[:, :, :-1]) for x in sums))
    upto = LogSums(*(runs(x[:, :, 1:]) for x in sums))
    r = runs(receptance)

    # Within a run: a difference for each pair.
    time = jnp.arange(run_len)
    is_past = (time[:, None] > time[None, :])[..., None]
    rows, columns = (..., slice(None), None, slice(None)), (..., None, slice(None), slice(None))
    weight = jnp.exp(jnp.where(is_past, before.at(*rows) - upto.at(*columns), -jnp.inf))
    near = jnp.sum(r[rows] * runs(key)[columns] * weight, axis=-1, dtype=dtype)
    if n_runs == 1:
        return near[:, :, 0]

    # Between runs: both factors from the border where the later run starts.
    border = before.at(..., slice(None, 1), slice(None))  # [batch, heads, runs, 1, key]
    left = r * jnp.exp(before - border)
    is_earlier = jnp.arange(chunk_len)[None, :] < run_len * jnp.arange(n_runs)[:, None]
    whole = LogSums(*(x[:, :, None, 1:] for x in sums))
    right = key[:, :, None] * jnp.exp(jnp.where(is_earlier[..., None], border - whole, -jnp.inf))
    narrow = (left.astype(key.dtype), right.astype(key.dtype))
    far = product("bhnik,bhnjk->bhnij", *narrow, dtype=dtype)

    same_run = jnp.eye(n_runs, dtype=dtype)[:, None, :, None]
    near = (near[..., None, :] * same_run[None, None]).reshape(far.shape)
    return (near + far).reshape(batch, heads, chunk_len, chunk_len)


FORMS = (
    Implementation("chunked", _chunked, unattractive=is_one_step),
    Implementation("recurrent", _recurrent),
)
