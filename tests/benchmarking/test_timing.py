"""What is timed, how often, with which inputs."""

import jax
import jax.numpy as jnp
import pytest

from longctx_jax.benchmarking import timing

FIELDS = {"trace_s", "compile_s", "median_ms", "quartile_1_ms", "quartile_3_ms", "min_ms"}


def add_one(x):
    return x + 1


def test_donated_inputs_continue_from_the_last_output():
    seen = []

    def make_inputs(last):
        seen.append(None if last is None else float(last[0]))
        return (jnp.zeros(3) if last is None else last,)

    row = timing.measure(jax.jit(add_one, donate_argnums=0), make_inputs, n_runs=4, n_warmup=2)
    # One run to start with, two to warm up, four that count; inputs are made for each.
    assert seen == [None, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert row.keys() >= FIELDS and (row["n_runs"], row["n_warmup"]) == (4, 2)
    assert row["min_ms"] <= row["quartile_1_ms"] <= row["median_ms"] <= row["quartile_3_ms"]


def test_cases_run_in_turns(monkeypatch):
    order = []

    def case(name):
        return timing.Case(jax.jit(add_one), lambda last: (order.append(name), (jnp.zeros(1),))[1])

    timing.measure_in_turns({"a": case("a"), "b": case("b")}, n_runs=2, n_warmup=0)
    assert "".join(order) == "ab" * 3  # the first of each pair compiles


def test_the_clock_covers_the_run_and_not_its_inputs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    class Compiled:
        def __call__(self, x):
            now[0] += 2.0
            return x

        def memory_analysis(self):
            return None

    class Function:
        def lower(self, *inputs):
            now[0] += 5.0
            return self

        def compile(self):
            now[0] += 7.0
            return Compiled()

    def make_inputs(last):
        now[0] += 100.0
        return (jnp.zeros(1),)

    row = timing.measure(Function(), make_inputs, n_runs=3, n_warmup=1)
    assert (row["trace_s"], row["compile_s"], row["median_ms"]) == (5.0, 7.0, 2000.0)
    assert (row["peak_bytes"], row["peak_bytes_kind"]) == (None, "unknown")
    longer = timing.measure(Function(), make_inputs, n_runs=1, min_seconds=11.0)
    assert longer["n_runs"] == 6
    shorter = timing.measure(Function(), make_inputs, n_runs=50, max_seconds=8.0)
    assert shorter["n_runs"] == 4
    least = timing.measure(Function(), make_inputs, n_runs=50, max_seconds=0.5)
    assert least["n_runs"] == timing.MIN_RUNS


def test_summary_is_in_milliseconds():
    row = timing.summary([0.001, 0.002, 0.003, 0.004, 0.1])
    assert row == {
        "n_runs": 5,
        "median_ms": 3.0,
        "quartile_1_ms": 2.0,
        "quartile_3_ms": 4.0,
        "min_ms": 1.0,
    }


def test_planned_memory_counts_a_donated_argument_once():
    x = jnp.zeros(1000, jnp.float32)
    kept = jax.jit(add_one).lower(x).compile()
    donated = jax.jit(add_one, donate_argnums=0).lower(x).compile()
    kept, donated = timing.memory_fields(kept), timing.memory_fields(donated)
    assert kept["peak_bytes"] - donated["peak_bytes"] == 4000
    assert kept["peak_bytes_kind"] == timing.COMPILED_PLAN


@pytest.mark.parametrize("counts", [{"n_runs": 0}, {"n_warmup": -1}])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="a measurement needs a run"):
        timing.measure(jax.jit(add_one), lambda _: (jnp.zeros(1),), **counts)
