"""The front door of decaying linear attention: checks the arguments and chooses an algorithm."""

import dataclasses
import functools

from longctx_jax.ops.decay.chunked import CHUNK_LEN, decay_attention_chunked
from longctx_jax.ops.decay.recurrent import decay_attention_recurrent
from longctx_jax.ops.decay.reference import decay_attention_reference
from longctx_jax.ops.dispatch import Implementation, choose, platform
from longctx_jax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class _Facts:
    platform: str
    dtype: str
    batch: int
    seq: int
    heads: int
    d_key: int
    d_value: int


def decay_attention(
    query: Float[Array, "batch seq heads key"],
    key: Float[Array, "batch seq heads key"],
    value: Float[Array, "batch seq heads value"],
    log_decay: Float[Array, " heads"],
    state: Float[Array, "batch heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq"] | None = None,
    scale: float | None = None,
    chunk_len: int = CHUNK_LEN,
    implementation: str = "auto",
) -> tuple[Float[Array, "batch seq heads value"], Float[Array, "batch heads key value"]]:
    """Returns exponentially decaying causal linear attention and the state after the last token.

    Args:
        query: [batch, seq, heads, key].
        key: as query.
        value: its width may differ.
        log_decay: log of the factor a head's memory keeps per token, <= 0; 0 never forgets, -inf
            keeps the current token only.
        state: S before the first token; None = zeros.
        reset: True where a token starts a new document: what came before is forgotten.
        scale: None = 1/sqrt(key width).
        chunk_len: tokens a chunk of the chunked form.
        implementation: "auto", "chunked", "recurrent" or "reference".

    Returns:
        out in the dtype of value; state [batch, heads, key, value], float32 (float64 for float64).

    Raises:
        ValueError: unknown implementation, or chunk_len < 1.

    Source: Wang et al. (2025), arXiv 2501.02573, for the family; see each algorithm's file.
    """
    if chunk_len < 1:
        raise ValueError(
            f"chunk_len must be at least 1: got {chunk_len}; set config.model.decay.chunk_len"
        )
    batch, seq, heads, d_key = query.shape
    facts = _Facts(platform(), str(query.dtype), batch, seq, heads, d_key, value.shape[-1])
    chosen = choose("decay_attention", IMPLEMENTATIONS, implementation, facts)
    run = chosen.run
    if chosen.name == "chunked":
        run = functools.partial(run, chunk_len=chunk_len)
    scale = d_key**-0.5 if scale is None else scale
    out, last = run(query, key, value, log_decay, state, reset=reset, scale=scale)
    return out.astype(value.dtype), last


def _recurrent_unattractive(facts: _Facts) -> str:
    return "" if facts.seq == 1 else "one sequential step a token"


IMPLEMENTATIONS = (
    Implementation("recurrent", decay_attention_recurrent, unattractive=_recurrent_unattractive),
    Implementation("chunked", decay_attention_chunked),
    Implementation("reference", decay_attention_reference),
)
