"""Timing of compiled functions: what a row's `measured` holds, with units in the names.

Compilation is timed apart from runs; a run ends when its whole output is ready; cases that are
compared run in turns (A B A B ...), so noise of the machine hits all of them. Not here: rows and
their files (`rows.py`), what to measure (the folder of each suite).
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from longctx_jax.accounting.programs import device_bytes
from longctx_jax.benchmarking.ratios import quartiles
from longctx_jax.benchmarking.rows import Fields

# (output of the last run, None before the first) -> arguments of the next; outside the clock.
MakeInputs = Callable[[Any], tuple]
Measured = dict[str, tuple[Fields, np.ndarray]]  # fields, seconds of every run; by case

COMPILED_PLAN = "compiled plan: arguments + outputs - aliased + temporaries"
MIN_RUNS = 3  # that a time limit must leave


@dataclasses.dataclass(frozen=True)
class Case:
    """A jitted function, and what makes its arguments (static ones must be bound already).

    Attributes:
        n_inner: how often one run does the work that is measured; times are divided by it.
        keeps_output: False drops each output, and make_inputs always gets None: outputs of many
            cases together may not fit.
        inspect: (arguments, output) of the very first run -> more fields of the row, e.g. errors.
    """

    function: Any
    make_inputs: MakeInputs
    n_inner: int = 1
    keeps_output: bool = True
    inspect: Callable[[tuple, Any], Fields] | None = None


def measure(
    function: Any,
    make_inputs: MakeInputs,
    *,
    n_runs: int = 20,
    n_warmup: int = 2,
    min_seconds: float = 0.0,
    max_seconds: float = 0.0,
) -> Fields:
    """Returns the measurement fields of one jitted function; see `measure_in_turns`."""
    cases = {"": Case(function, make_inputs)}
    measured = measure_in_turns(
        cases,
        n_runs=n_runs,
        n_warmup=n_warmup,
        min_seconds=min_seconds,
        max_seconds=max_seconds,
    )
    return measured[""][0]


def measure_in_turns(
    cases: Mapping[str, Case],
    *,
    n_runs: int = 20,
    n_warmup: int = 2,
    min_seconds: float = 0.0,
    max_seconds: float = 0.0,
    max_bytes: int = 0,
    may_fail: tuple[type[Exception], ...] = (),
) -> Measured:
    """Returns (measurement fields, seconds of every run) a case; run r of all cases lie together.

    Args:
        cases: by name. Donated arguments are safe: make_inputs hands out new ones each run.
        n_runs: measured rounds, >= 1.
        n_warmup: rounds before them that do not count.
        min_seconds: go on past n_runs until the rounds add up to this.
        max_seconds: stop early once the rounds add up to this (after 3 at least); 0 = no limit.
        max_bytes: a case whose compiled plan holds more is not run; 0 = no limit.
        may_fail: a case whose compilation or first run raises one of these is not run further.

    Returns:
        Fields trace_s, compile_s, n_runs (as made), n_warmup, median_ms, quartile_1_ms,
        quartile_3_ms, min_ms, and those of `memory_fields`. For a case that is not run: the field
        `skipped` with the reason, and no times.

    Raises:
        ValueError: if n_runs < 1 or n_warmup < 0.
    """
    if n_runs < 1 or n_warmup < 0:
        raise ValueError(
            f"a measurement needs a run: got n_runs={n_runs}, n_warmup={n_warmup}; "
            "set --n_runs to 1 or more"
        )
    compiled, fields, outputs = {}, {}, {}
    skipped: dict[str, Fields] = {}
    for name, case in cases.items():
        try:
            program, fields[name], output = _first_run(case, max_bytes)
        except (*may_fail, _TooLarge) as error:
            skipped[name] = {"skipped": _first_line(error)}
            continue
        compiled[name], outputs[name] = program, output if case.keeps_output else None
        del output
    times: dict[str, list[float]] = {name: [] for name in compiled}
    total, n_done = 0.0, -n_warmup
    while compiled and (n_done < n_runs or total < min_seconds):
        if max_seconds and total >= max_seconds and n_done >= MIN_RUNS:
            break
        for name, program in compiled.items():
            case = cases[name]
            inputs = jax.block_until_ready(case.make_inputs(outputs.pop(name)))
            start = time.perf_counter()
            output = jax.block_until_ready(program(*inputs))
            seconds = time.perf_counter() - start
            outputs[name] = output if case.keeps_output else None
            del inputs, output
            if n_done >= 0:
                times[name].append(seconds / case.n_inner)
                total += seconds
        n_done += 1
    return {
        name: (skipped[name], np.zeros(0))
        if name in skipped
        else (
            fields[name]
            | summary(times[name])
            | {"n_warmup": n_warmup}
            | memory_fields(compiled[name]),
            np.asarray(times[name]),
        )
        for name in cases
    }


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long a suite measures: see `measure_in_turns`.

    Attributes:
        is_quick: shapes so small that they only show that everything runs.
        lengths: sequence or context lengths instead of the suite's own; () = those.
    """

    n_runs: int = 20
    n_warmup: int = 2
    max_seconds: float = 0.0
    is_quick: bool = False
    lengths: tuple[int, ...] = ()

    def measure(self, cases: Mapping[str, Case]) -> Measured:
        """Returns `measure_in_turns` of the cases within these limits."""
        return measure_in_turns(
            cases, n_runs=self.n_runs, n_warmup=self.n_warmup, max_seconds=self.max_seconds
        )

    def measure_able(
        self,
        cases: Mapping[str, Case],
        *,
        most_runs: int = 0,
        most_warmup: int = 2,
        cpu_seconds: float = 0.0,
        may_fail: tuple[type[Exception], ...] = (),
    ) -> Measured:
        """Returns the same of cases some of which may not run here, or not fit: those say so.

        Args:
            cases: by name.
            most_runs: and no more; 0 = no other limit.
            most_warmup: rounds that do not count.
            cpu_seconds: that the rounds may take on a CPU; 0 = no other limit.
            may_fail: what a case may raise, too.
        """
        seconds = self.max_seconds
        if cpu_seconds and jax.default_backend() == "cpu":
            seconds = min(seconds or cpu_seconds, cpu_seconds)
        return measure_in_turns(
            cases,
            n_runs=min(self.n_runs, most_runs or self.n_runs),
            n_warmup=min(self.n_warmup, most_warmup),
            max_seconds=seconds,
            max_bytes=device_bytes(),
            may_fail=(jax.errors.JaxRuntimeError, NotImplementedError, *may_fail),
        )


def why_not(function: Callable[..., Any], *arguments: Any) -> str:
    """Returns why a function cannot run on such arguments here, "" if it can; compiles nothing."""
    try:
        jax.eval_shape(function, *arguments)
    except NotImplementedError as error:
        return str(error)
    return ""


class _TooLarge(Exception):
    """The compiled plan of a case holds more bytes than it may."""


def _first_run(case: Case, max_bytes: int) -> tuple[Any, Fields, Any]:
    """Returns the compiled program, its first fields, and the output of one run."""
    inputs = jax.block_until_ready(case.make_inputs(None))
    program, fields = compiled(case.function, inputs)
    planned = memory_fields(program)["peak_bytes"] if max_bytes else None
    if planned is not None and planned > max_bytes:
        raise _TooLarge(f"its plan holds {planned:,} bytes, more than {max_bytes:,}")
    output = jax.block_until_ready(program(*inputs))
    if case.inspect is not None:
        fields |= case.inspect(inputs, output)
    return program, fields, output


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def summary(seconds: Sequence[float]) -> Fields:
    """Returns n_runs, the median, the quartiles and the minimum of run times, in ms."""
    times = quartiles("time", 1e3 * np.asarray(seconds))
    return {
        "n_runs": len(seconds),
        "median_ms": times["time"],
        "quartile_1_ms": times["time_quartile_1"],
        "quartile_3_ms": times["time_quartile_3"],
        "min_ms": round(1e3 * min(seconds), 4),
    }


def memory_fields(compiled: Any) -> Fields:
    """Returns peak_bytes and peak_bytes_kind, and device_peak_bytes where the device counts.

    peak_bytes belongs to the program alone: what its compiled plan allocates. device_peak_bytes is
    the device's high-water mark since the process started, which earlier cases may have set.
    """
    plan = compiled.memory_analysis()
    row: Fields = {"peak_bytes": None, "peak_bytes_kind": "unknown"}
    if plan is not None:
        held = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        row = {"peak_bytes": held + plan.temp_size_in_bytes, "peak_bytes_kind": COMPILED_PLAN}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        row["device_peak_bytes"] = stats["peak_bytes_in_use"]
    return row


def compiled(function: Any, inputs: tuple) -> tuple[Any, Fields]:
    """Returns the compiled program of a jitted function, and its trace_s and compile_s."""
    start = time.perf_counter()
    lowered = function.lower(*inputs)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    return program, {"trace_s": round(traced - start, 4), "compile_s": round(done - traced, 4)}
