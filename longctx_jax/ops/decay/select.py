"""The front door of decaying linear attention: checks the arguments and chooses an algorithm."""

import dataclasses
import functools
import math
import statistics
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.core import Tracer

from longctx_jax.ops.checked import checked
from longctx_jax.ops.decay import (
    block,
    causal_dot_product,
    chunked,
    cost,
    fleet,
    prefix,
    quadratic,
    recurrent,
    recursion,
    reference,
    table,
    two_pass,
)
from longctx_jax.ops.decay.facts import Facts, facts_of
from longctx_jax.ops.decay.linear_vjp import share_heads
from longctx_jax.ops.decay.powers import separate_resets
from longctx_jax.ops.dispatch import Implementation, choose, leaf, leaf_unsupported
from longctx_jax.ops.partition import by_rows_and_heads
from longctx_jax.ops.quarantine import find_poison, is_bad
from longctx_jax.typing import Array, Bool, Float

CHUNK_LEN = two_pass.CHUNK_LEN  # tokens


IMPLEMENTATIONS = (
    Implementation(
        "pallas_triton",
        leaf("decay.pallas_triton", "decay_attention_pallas_triton"),
        unsupported=leaf_unsupported("decay.pallas_triton"),
    ),
    Implementation(
        "pallas_mosaic_gpu",
        leaf("decay.pallas_mosaic_gpu", "decay_attention_pallas_mosaic_gpu"),
        unsupported=leaf_unsupported("decay.pallas_mosaic_gpu"),
    ),
    Implementation("two_pass", two_pass.decay_attention_two_pass),
    Implementation("chunked", chunked.decay_attention_chunked),
    Implementation("block", block.decay_attention_block),
    Implementation("prefix", prefix.decay_attention_prefix),
    Implementation("quadratic", quadratic.decay_attention_quadratic),
    Implementation("recurrent", recurrent.decay_attention_recurrent),
    Implementation("causal_dot_product", causal_dot_product.decay_attention_causal_dot_product),
    Implementation("recursion", recursion.decay_attention_recursion),
    Implementation("fleet", fleet.decay_attention_fleet),
    Implementation("reference", reference.decay_attention_reference),
)
STEPS = (
    Implementation("recurrent", recurrent.step),
    Implementation(
        "pallas_triton",
        leaf("decay.pallas_triton_step", "step"),
        unsupported=leaf_unsupported("decay.pallas_triton"),
    ),
)
CHUNKED = ("two_pass", "chunked", "block", "prefix", "recursion")  # take chunk_len
KERNELS = ("pallas_triton", "pallas_mosaic_gpu")  # share heads themselves


@checked
def decay_attention(
    query: Float[Array, "batch seq query_heads key"],
    key: Float[Array, "batch seq key_heads key"],
    value: Float[Array, "batch seq value_heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch seq heads"],
    state: Float[Array, "batch state_heads key value"] | None = None,
    *,
    reset: Bool[Array, "batch seq"] | None = None,
    scale: float | None = None,
    chunk_len: int = CHUNK_LEN,
    for_training: bool = True,
    implementation: str = "auto",
) -> tuple[
    Float[Array, "batch seq state_heads value"], Float[Array, "batch state_heads key value"]
]:
    """Returns exponentially decaying causal linear attention and the state after the last token.

    Args:
        query: [batch, seq, heads, key]. The number of heads of the result is the largest among
            query, key, value and log_decay; the others must divide it, and each of their heads
            serves a run of neighbours (key and value of grouped-query attention; query and key of
            state-space duality).
        key: as query.
        value: its width may differ.
        log_decay: log of the factor that memory keeps per token, <= 0: 0 never forgets, -inf keeps
            the current token only. One constant a head, or [batch, seq, heads]: the factor between
            the token before and this one, e.g. a gate.
        state: S before the first token; None = zeros.
        reset: True where a token starts a new document: what came before is forgotten, NaN too.
        scale: None = 1/sqrt(key width).
        chunk_len: tokens a chunk of the forms that have chunks and are not kernels.
        for_training: what "auto" minimises: forward and backward time, or the forward alone.
        implementation: "auto" or a name in `IMPLEMENTATIONS`; all give the same result.

    Returns:
        out in the dtype of value; state [batch, heads, key, value], float32 (float64 for float64).

    Raises:
        ValueError: unknown implementation, chunk_len < 1, shapes that contradict each other, or,
            where the values are known (outside jit), a constant log decay above 0.
        NotImplementedError: if the named implementation cannot run, with the reason.

    Forward-mode derivatives need a form without a reverse rule of its own, e.g. "two_pass".

    Source: Wang et al. (2025), arXiv 2501.02573, for the family; see each algorithm's file.
    """
    if chunk_len < 1:
        raise ValueError(
            f"chunk_len must be at least 1: got {chunk_len}; set config.model.decay.chunk_len"
        )
    if log_decay.ndim == 1 and not isinstance(log_decay, Tracer):
        _require_no_growth(np.asarray(log_decay))
    if isinstance(scale, Tracer):
        raise TypeError(
            "decay_attention: scale must be a number known when tracing: got a traced value; "
            "multiply query by it and pass scale=1.0"
        )
    poison = None
    if reset is not None:
        bad = is_bad(query) | is_bad(key) | is_bad(value)
        if log_decay.ndim == 3:
            bad |= is_bad(log_decay, allow_minus_inf=True)
        poison = find_poison(bad, reset, state)
        query, key, value = (poison.clean(x) for x in (query, key, value))
        log_decay = poison.clean(log_decay) if log_decay.ndim == 3 else log_decay
        state = poison.clean_state(state)
    arrays = (query, key, value, log_decay)
    facts = facts_of(*arrays, for_training, state=state, reset=reset)
    name = implementation
    if name == "auto":
        name = _choose_automatically(facts)
    chosen = choose("decay_attention", IMPLEMENTATIONS, name, facts)
    run = chosen.run
    if chosen.name in CHUNKED:
        run = functools.partial(run, chunk_len=chunk_len)
    if chosen.name not in KERNELS:
        query, key, value = (share_heads(x, facts.heads) for x in (query, key, value))
    if log_decay.shape[-1] != facts.heads:
        log_decay = jnp.repeat(log_decay, facts.heads // log_decay.shape[-1], axis=-1)
    log_decay, resets = separate_resets(log_decay, None if reset is None else reset[..., None])
    scale = 1 / math.sqrt(facts.d_key) if scale is None else scale
    if chosen.name in KERNELS:
        out, last = _on_mesh(run, (query, key, value, log_decay, state, resets), scale)
    else:
        out, last = run(query, key, value, log_decay, state, reset=resets, scale=scale)
    out = out.astype(value.dtype)
    return (out, last) if poison is None else (poison.spread(out), poison.spread_state(last))


def _on_mesh(run: Any, arrays: tuple[Any, ...], scale: float) -> tuple[Array, Array]:
    """Runs a kernel for the rows and heads of each device."""
    *_, log_decay, _, resets = arrays
    decay_dims = "h" if log_decay.ndim == 1 else "b.h"
    reset_dims = "b.h" if resets is not None and resets.shape[-1] > 1 else "b.."

    def here(query, key, value, log_decay, state, resets):
        return run(query, key, value, log_decay, state, reset=resets, scale=scale)

    dims = ("b.h.", "b.h.", "b.h.", decay_dims, "bh..", reset_dims)
    return by_rows_and_heads(here, arrays, dims, ("b.h.", "bh.."))


@checked
def decay_attention_step(
    query: Float[Array, "batch query_heads key"],
    key: Float[Array, "batch key_heads key"],
    value: Float[Array, "batch value_heads value"],
    log_decay: Float[Array, " heads"] | Float[Array, "batch heads"],
    state: Float[Array, "batch state_heads key value"],
    *,
    reset: Bool[Array, " batch"] | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> tuple[Float[Array, "batch state_heads value"], Float[Array, "batch state_heads key value"]]:
    """Advances one token: S <- decay S + k v^T, out = scale S^T q.

    Args:
        query: of one token, [batch, heads, key]; heads may be shared as in `decay_attention`.
        key: as query.
        value: [batch, heads, value].
        log_decay: [heads], or of this token [batch, heads].
        state: S after the token before, float32 (float64 for float64 input).
        reset: rows whose token starts a new document; their S is cleared first.
        scale: None = 1/sqrt(key width).
        implementation: "auto", "recurrent" (plain JAX; differentiable) or "pallas_triton" (a GPU
            kernel, without a gradient, which reads and writes the state once). "auto" is
            "recurrent" until the kernel has been measured to be faster.

    Returns:
        out in the dtype of value, and the new state.

    Cost: 6 batch heads key value flops; reads and writes the state once.
    """
    heads = state.shape[1]
    decay = log_decay if log_decay.ndim == 1 else log_decay[:, None]
    tokens = (query[:, None], key[:, None], value[:, None])
    facts = facts_of(*tokens, decay, False, state=state)
    chosen = choose("decay_attention_step", STEPS, implementation, facts)
    query, key, value = (share_heads(x[:, None], heads)[:, 0] for x in (query, key, value))
    if log_decay.shape[-1] != heads:
        log_decay = jnp.repeat(log_decay, heads // log_decay.shape[-1], axis=-1)
    if reset is not None:  # what is cleared is chosen away: 0 times a NaN would stay
        state = jnp.where(reset[:, None, None, None], 0, state)
        reset = reset[:, None]
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return chosen.run(query, key, value, log_decay, state, reset=reset, scale=scale)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One form in the eyes of "auto".

    Attributes:
        ms: expected time, or None where it cannot run.
        source: "measured", "modelled", or why it cannot run.
    """

    name: str
    ms: float | None
    source: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What "auto" takes for a call, and what it thinks of every form, best first."""

    facts: Facts
    chosen: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        """Returns a table, the chosen form marked."""
        lines = [", ".join(f"{k}={v}" for k, v in dataclasses.asdict(self.facts).items())]
        for c in self.candidates:
            mark = "->" if c.name == self.chosen else "  "
            time = "" if c.ms is None else f"{c.ms:.4g} ms"
            lines.append(f"{mark} {c.name:20} {time:>12}  {c.source}")
        return "\n".join(lines)


def explain(
    query: Any, key: Any, value: Any, log_decay: Any, *, for_training: bool = True
) -> Explanation:
    """Returns which form `decay_attention` takes by itself for these arguments, and why.

    Args:
        query: array or `jax.ShapeDtypeStruct`, as are the others; see `decay_attention`.
        key: as query.
        value: as query.
        log_decay: as query.
        for_training: as in `decay_attention`.

    Returns:
        An `Explanation`; print it.
    """
    return explain_facts(facts_of(query, key, value, log_decay, for_training))


def explain_facts(facts: Facts) -> Explanation:
    """Returns the explanation for given facts: a pure function of them and the recorded table."""
    rows = table.load_table(facts.device)
    row = table.nearest_row(facts, rows) or {}
    times = row.get(_pass(facts), {})
    recorded_facts = _facts_of_row(facts, row) if row else facts
    known = {name for r in rows for name in r[_pass(facts)]} if times else set()
    modelled = {i.name: 1e3 * cost.seconds(i.name, facts) for i in IMPLEMENTATIONS}
    # From the recorded shape to this one, and from the model's clock to the device's.
    grown = {n: modelled[n] / (1e3 * cost.seconds(n, recorded_facts)) for n in times}
    clock = statistics.median(times[n] * grown[n] / modelled[n] for n in times) if times else 1.0
    where = "measured at batch={batch} heads={heads} seq={seq}".format_map(row) if row else ""
    source = where if recorded_facts == facts else f"scaled from what was {where}"
    able, unable = [], []
    for implementation in IMPLEMENTATIONS:
        name = implementation.name
        if reason := implementation.unsupported(facts) or implementation.unattractive(facts):
            unable.append(Candidate(name, None, f"passed over: {reason}"))
        elif name in times:
            able.append(Candidate(name, times[name] * grown[name], source))
        elif name in known:
            unable.append(Candidate(name, None, f"passed over: not among those {where}"))
        else:
            able.append(Candidate(name, clock * modelled[name], "modelled"))
    able = able or [Candidate("reference", modelled["reference"], "modelled")]
    able.sort(
        key=lambda c: c.ms or 0.0
    )  # of equals the first in IMPLEMENTATIONS: the sort is stable
    return Explanation(facts, able[0].name, (*able, *unable))


def _pass(facts: Facts) -> str:
    return "training_ms" if facts.for_training else "forward_ms"


def _facts_of_row(facts: Facts, row: dict[str, Any]) -> Facts:
    shape = {name: row[name] for name in ("batch", "seq", "heads", "d_key", "d_value")}
    return dataclasses.replace(facts, **shape)


def _require_no_growth(log_decay: np.ndarray) -> None:
    """Raises if a constant decay is above 1, where its value is known (not under jit)."""
    if not np.all(log_decay <= 0):
        raise ValueError(
            "decay_attention: log_decay must be <= 0, the log of what a token keeps: got "
            f"{log_decay.tolist()}; pass jnp.log(decay)"
        )


_ALREADY_SAID: set[Facts] = set()


def _choose_automatically(facts: Facts) -> str:
    explanation = explain_facts(facts)
    if facts not in _ALREADY_SAID:
        _ALREADY_SAID.add(facts)
        best, *others = explanation.candidates
        rest = (f"{c.name}: {c.source if c.ms is None else f'{c.ms:.3g} ms'}" for c in others)
        logging.info(
            "op=decay_attention implementation=%s because=%.3g ms, %s; facts=%s; others=%s",
            best.name,
            best.ms,
            best.source,
            facts,
            ", ".join(rest),
        )
    return explanation.chosen
