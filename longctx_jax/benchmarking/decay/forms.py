"""The suite `decay`: every form of decay attention and exact attention, by shape, forward and back.

Parts: "main" (one shape at many lengths, all forms), "grid" (batches, heads and widths, the forms
that may win there), "float32", "per_token" (a decay a token, as gates make), "long" (a million
tokens). What a run is: `cases.py`; ideal counts: `floors.py`; other libraries: `peers.py`;
crossover, ratios and the recorded table: `summary.py`. A form that is not run has a row that says
why.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

import jax

from longctx_jax.benchmarking import roofline
from longctx_jax.benchmarking.decay import cases, floors, peers, summary
from longctx_jax.benchmarking.decay.parts import PARTS
from longctx_jax.benchmarking.rows import Fields, Row, flat, make
from longctx_jax.benchmarking.timing import Limits, why_not
from longctx_jax.ops.attention import attention
from longctx_jax.ops.decay.facts import Facts, facts_of
from longctx_jax.ops.decay.select import IMPLEMENTATIONS, explain_facts

PASSES = {"forward": False, "forward_backward": True}  # name -> for_training
SOFTMAX_FORMS = ("softmax cudnn", "softmax dense", "softmax blockwise")
LENGTHS = (128, 512, 2048, 8192, 32_768, 131_072)
CPU_LENGTHS = (128, 512, 2048, 8192)
LONG = 1_048_576  # tokens
QUICK_LENGTHS = (32, 96)
# Forms with seq^2 scores in memory, or a loop over tokens or rank components.
MAX_SEQ = {
    "gpu": dict.fromkeys(("reference", "quadratic", "softmax dense"), 16_384)
    | dict.fromkeys(("recurrent", "causal_dot_product", "fleet"), 8192),
    "cpu": dict.fromkeys(("reference", "quadratic", "softmax dense", "fleet"), 2048)
    | {"softmax blockwise": 2048},
}
MAX_PREDICTED_S = {"gpu": 0.5, "cpu": 2.0}  # of one call
MAX_PREDICTED_RATIO = 30.0  # to the best form, in the parts that do not show all forms
SLOW_S = 0.02  # forms above take turns of their own, with fewer runs
SLOW_RUNS = 5
CPU_SECONDS = 12.0  # of rounds a group: the whole suite takes minutes


@dataclasses.dataclass(frozen=True)
class Shape:
    """One shape of one part."""

    part: str
    batch: int
    heads: int
    width: int
    seq: int
    dtype: str
    is_per_token: bool = False

    def facts(self, for_training: bool) -> Facts:
        """Returns what the choice of a form depends on, on the device of this process."""
        shape = (self.batch, self.seq, self.heads)
        array = jax.ShapeDtypeStruct((*shape, self.width), self.dtype)
        log_decay = jax.ShapeDtypeStruct(shape if self.is_per_token else shape[2:], "float32")
        return facts_of(array, array, array, log_decay, for_training)


def shapes(platform: str, limits: Limits, parts: Sequence[str] = PARTS) -> list[Shape]:
    """Returns the shapes of the parts; short sequences of every width come first.

    Args:
        platform: "cpu" has a small grid in float32; everything else the whole one in bfloat16.
        limits: is_quick takes tiny shapes, lengths replaces the suite's own.
        parts: of `PARTS`.
    """
    is_cpu = platform == "cpu"
    own = QUICK_LENGTHS if limits.is_quick else CPU_LENGTHS if is_cpu else LENGTHS
    lengths = limits.lengths or own
    main = (1, 2, 16) if limits.is_quick else (1, 4, 64) if is_cpu else (1, 16, 64)
    dtype = "float32" if is_cpu else "bfloat16"
    sizes: dict[str, list[tuple[int, int, int]]] = {part: [main] for part in PARTS}
    if is_cpu or limits.is_quick:
        sizes |= {"grid": [], "float32": [], "long": []}
    else:
        sizes["grid"] = [s for s in itertools.product((1, 8), (16, 32), (64, 128)) if s != main]
        sizes["float32"] = [main, (8, 32, 64), (1, 16, 128)]
        sizes["per_token"] = [main, (8, 32, 128)]
    found = []
    for part in parts:
        chosen = lengths
        if part == "long":
            chosen = () if limits.lengths and LONG not in limits.lengths else (LONG,)
        elif part in ("float32", "per_token") and not limits.lengths:
            chosen = own[1:] if limits.is_quick else own[1:-1]
        for seq, (batch, heads, width) in itertools.product(chosen, sizes[part]):
            kind = "float32" if part == "float32" else dtype
            found.append(Shape(part, batch, heads, width, seq, kind, part == "per_token"))
    return found


def decay_rows(
    limits: Limits, parts: Sequence[str] = PARTS, *, with_peers: bool = False
) -> Iterator[Row]:
    """Yields the rows of the suite: shape after shape, then what they sum up to.

    Args:
        limits: how long to measure.
        parts: of `PARTS`, which to run.
        with_peers: also time other libraries at every shape, where they can be imported.
    """
    platform = jax.default_backend()
    rows: list[Fields] = []
    chosen = shapes(platform, limits, parts)
    for part in parts:
        if not any(shape.part == part for shape in chosen):
            reason = f"no shapes of this part on {platform}"
            reason += " at these lengths" if limits.lengths else " or in a quick run"
            yield make({"part": part, "name": part}, {"skipped": reason})
    # Near in time on a machine that others share; last on a GPU, which a faulty kernel may poison.
    peers_last = platform != "cpu"
    rounds = [(True, with_peers and not peers_last), (False, with_peers and peers_last)]
    for with_ours, with_others in rounds:
        for shape, name in itertools.product(chosen, PASSES):
            if with_ours or with_others:
                for row in _shape_rows(shape, name, limits, with_ours, with_others):
                    rows.append(flat(row))
                    yield row
    yield from summary.crossover_rows(rows)
    if with_peers:
        yield from summary.ratio_rows(rows)


def _shape_rows(
    shape: Shape, pass_name: str, limits: Limits, with_ours: bool, with_peers: bool
) -> Iterator[Row]:
    """Yields a row a form, run or not, and a row a peer, for one shape and pass."""
    facts = shape.facts(PASSES[pass_name])
    about = {"part": shape.part, "pass": pass_name, **shape_fields(facts)}
    top = roofline.ceiling(facts.device, facts.dtype, is_quick=limits.is_quick)
    flops = floors.ideal_flops(facts)
    reasons: dict[str, str] = {}
    if with_ours:
        reasons = skip_reasons(facts, limits, shows_all=shape.part == "main")
    names = [name for name, reason in reasons.items() if not reason]
    n_sets = max([cases.inner_calls(n, facts) for n in names], default=1)
    inputs = cases.make_inputs(facts, max(n_sets, cases.N_SETS))
    measured = _measure(names, inputs, limits)
    auto = explain_facts(facts).chosen
    for name, reason in reasons.items():
        row = {"skipped": reason} if reason else measured[name]
        if "median_ms" in row:
            is_softmax = name.startswith(cases.SOFTMAX)
            needed = floors.softmax_ideal_flops(facts) if is_softmax else flops
            row |= floors.roofline_fields(facts, row["median_ms"], top, needed)
            row |= {"is_auto": name == auto}
        yield make({"name": name, **about}, row)
    if with_peers:
        for name, row in peers.peer_rows(inputs, limits):
            if "median_ms" in row:
                row |= floors.roofline_fields(facts, row["median_ms"], top, flops)
            yield make({"name": name, **about, "part": "peers"}, row)


def shape_fields(facts: Facts) -> Fields:
    """Returns the fields that say which shape a row is about."""
    return {
        "batch_size": facts.batch,
        "n_heads": facts.heads,
        "seq_len": facts.seq,
        "d_key": facts.d_key,
        "d_value": facts.d_value,
        "dtype": facts.dtype,
        "is_per_token": facts.is_per_token,
    }


def skip_reasons(facts: Facts, limits: Limits, *, shows_all: bool) -> dict[str, str]:
    """Returns why each form is not run at a shape, "" where it is.

    Args:
        facts: of the shape.
        limits: quick shapes have no bounds.
        shows_all: False also leaves out forms predicted to be far from the best.
    """
    reasons = {i.name: i.unsupported(facts) for i in IMPLEMENTATIONS}
    if not facts.is_per_token:
        reasons |= {name: _softmax_unsupported(name, facts) for name in SOFTMAX_FORMS}
    if limits.is_quick:
        return reasons
    platform = facts.platform if facts.platform in MAX_SEQ else "gpu"
    seconds = {name: cases.predicted_seconds(name, facts) for name in reasons}
    able = [s for name, s in seconds.items() if s and not reasons[name]]
    best = min(able, default=0.0)
    for name in (name for name, reason in reasons.items() if not reason):
        longest = MAX_SEQ[platform].get(name, facts.seq)
        most = MAX_PREDICTED_S[platform]
        if facts.seq > longest:
            reasons[name] = f"the suite runs it up to {longest} tokens on {platform}"
        elif seconds[name] > most:
            reasons[name] = f"predicted {seconds[name]:.2g} s a call, the suite's bound is {most} s"
        elif not shows_all and seconds[name] > MAX_PREDICTED_RATIO * best:
            ratio = seconds[name] / best
            reasons[name] = f"predicted {ratio:.0f} times the best form's time; see part main"
    return reasons


def _softmax_unsupported(name: str, facts: Facts) -> str:
    shape = (facts.batch, facts.seq, facts.heads, facts.d_key)
    array = jax.ShapeDtypeStruct(shape, facts.dtype)
    implementation = name.removeprefix(cases.SOFTMAX)
    form = functools.partial(attention, implementation=implementation)
    return why_not(form, array, array, array)


def _measure(names: Sequence[str], inputs: cases.Inputs, limits: Limits) -> dict[str, Fields]:
    """Returns the measurement of each form: quick ones in turns, then slow ones in turns."""
    facts = inputs.facts
    groups = ([], [])
    for name in names:
        groups[cases.predicted_seconds(name, facts) > SLOW_S].append(name)
    rows = {}
    for group, most in zip(groups, (limits.n_runs, SLOW_RUNS), strict=True):
        able = {name: cases.make_case(name, inputs) for name in group}
        measured = limits.measure_able(able, most_runs=most, cpu_seconds=CPU_SECONDS)
        rows |= {name: row for name, (row, _) in measured.items()}
    for row in rows.values():
        if row.get("peak_bytes"):  # of one call: the others' arguments and outputs left out
            row["peak_bytes"] -= (row["n_inner"] - 1) * inputs.bytes_per_call()
    return rows
