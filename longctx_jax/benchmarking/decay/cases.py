"""One thing to time of the suite `decay`: inputs, the compiled function, its error.

A form is an implementation of decay attention, or "softmax <implementation>" of exact attention.
Pass `forward` computes the output; `forward_backward` the output and the gradients of query, key,
value (and of a decay per token) for a fixed cotangent. On a GPU one run holds several calls on
inputs of their own, each waiting for the one before, so that launching does not count.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.benchmarking.rows import Fields
from longctx_jax.benchmarking.timing import Case
from longctx_jax.nn.mixers.decay import log_decays
from longctx_jax.ops.attention import attention
from longctx_jax.ops.decay import cost, decay_attention
from longctx_jax.ops.decay.facts import Facts

SOFTMAX = "softmax "
ERROR_TOKENS = 2048  # causality: the first tokens' outputs do not depend on the rest
RUN_S = 250e-6  # a run on a GPU holds calls for about this long
MAX_INNER = 16
N_SETS = 3  # of inputs that runs of one call each take turns with
MAX_SETS_BYTES = 2**30  # no second set of inputs beyond this

Arrays = tuple[jax.Array, ...]  # query, key, value, log_decay[, cotangent]


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """Sets of random arguments of one shape, made once and shared by all forms."""

    facts: Facts
    sets: tuple[Arrays, ...]
    references: dict[Any, list[np.ndarray]] = dataclasses.field(default_factory=dict)

    def bytes_per_call(self) -> int:
        """Returns the bytes of one set of arguments and of its results."""
        arrays = self.sets[0]
        n_bytes = sum(x.nbytes for x in arrays)
        return 2 * n_bytes if self.facts.for_training else n_bytes + arrays[2].nbytes

    def reference(
        self, *, is_softmax: bool = False, log_decay: tuple[float, ...] | None = None
    ) -> list[np.ndarray]:
        """Returns the float64 results for the first set, cut as `cut` does; computed once.

        Args:
            is_softmax: of exact attention rather than decay attention.
            log_decay: of each head, instead of the set's own.
        """
        if (is_softmax, log_decay) not in self.references:
            arrays = list(self.sets[0])
            if log_decay is not None:
                arrays[3] = jnp.asarray(log_decay, jnp.float32)
            results = _reference([cut(x) for x in arrays], self.facts, is_softmax)
            self.references[is_softmax, log_decay] = results
        return self.references[is_softmax, log_decay]


def make_inputs(facts: Facts, n_sets: int, seed: int = 0) -> Inputs:
    """Returns n_sets (one, if they would be large) of normal q, k, v, a decay, and a cotangent.

    The decay is RetNet's of each head, or log sigmoid of normal numbers around 4 of each token.
    """
    shape = (facts.batch, facts.seq, facts.heads)
    decay = jnp.asarray(log_decays("retnet", facts.heads), jnp.float32)

    @jax.jit
    def make(key):
        keys = jax.random.split(key, 5)
        widths = (facts.d_key, facts.d_key, facts.d_value, facts.d_value)
        q, k, v, dout = (
            jax.random.normal(key, (*shape, width), facts.dtype)
            for key, width in zip(keys, widths, strict=False)
        )
        gate = jax.nn.log_sigmoid(4 + jax.random.normal(keys[4], shape))
        log_decay = gate if facts.is_per_token else decay
        return (q, k, v, log_decay, dout) if facts.for_training else (q, k, v, log_decay)

    width = 3 * facts.d_key + 2 * facts.d_value
    n_bytes = math.prod(shape) * width * np.dtype(facts.dtype).itemsize
    n_sets = max(1, min(n_sets, MAX_SETS_BYTES // n_bytes))
    return Inputs(facts, tuple(make(jax.random.key(seed + i)) for i in range(n_sets)))


def predicted_seconds(name: str, facts: Facts) -> float:
    """Returns the modelled time of a form (0 where there is no model), for bounds and n_inner."""
    if name.startswith(SOFTMAX):
        device = cost.DEVICES.get(facts.platform, cost.DEVICES["cpu"])
        scores = float(facts.batch * facts.heads) * facts.seq**2
        work = 2 * scores * (facts.d_key + facts.d_value)
        seconds = work / (0.5 * device.matrix_flops)
        if name != SOFTMAX + "cudnn":  # scores go through memory about four times
            seconds += 16 * scores / device.bandwidth
        return seconds * (3.5 if facts.for_training else 1)
    try:
        return cost.seconds(name, facts)
    except KeyError:
        return 0.0


def inner_calls(name: str, facts: Facts) -> int:
    """Returns how many calls one run holds: a power of two, 1 except for short ones on a GPU."""
    if facts.platform != "gpu":
        return 1
    calls = RUN_S / max(predicted_seconds(name, facts), RUN_S / MAX_INNER)
    return 2 ** max(0, math.floor(math.log2(calls)))


def make_case(name: str, inputs: Inputs) -> Case:
    """Returns the case of a form; its row gets n_inner and the errors of its first run."""
    n_inner = min(inner_calls(name, inputs.facts), len(inputs.sets))
    one = functools.partial(one_call, form(name, inputs.facts.for_training), inputs.facts)
    starts = itertools.count(step=n_inner)
    is_softmax = name.startswith(SOFTMAX)

    def next_inputs(last):
        del last
        start = next(starts)
        return tuple(inputs.sets[(start + i) % len(inputs.sets)] for i in range(n_inner))

    def inspect(arguments, results) -> Fields:
        del arguments
        errors = error_fields([cut(x) for x in results[0]], inputs.reference(is_softmax=is_softmax))
        return {"n_inner": n_inner} | errors

    # Outputs of all forms together would not fit at the largest shapes.
    options = {"n_inner": n_inner, "keeps_output": False, "inspect": inspect}
    return Case(jax.jit(functools.partial(chain, one)), next_inputs, **options)


def form(name: str, for_training: bool = True) -> Callable[..., jax.Array]:
    """Returns (query, key, value, log_decay) -> out of the form of that name."""
    if name.startswith(SOFTMAX):
        implementation = name.removeprefix(SOFTMAX)
        return lambda q, k, v, _: attention(q, k, v, implementation=implementation)
    options: dict[str, Any] = {"implementation": name, "for_training": for_training}
    return lambda *arrays: decay_attention(*arrays, **options)[0]


def one_call(function: Callable[..., jax.Array], facts: Facts, *arrays: jax.Array) -> Arrays:
    """Returns (out,), or with a fifth array, the cotangent, (out, dq, dk, dv[, dlog_decay])."""
    if not facts.for_training:
        return (function(*arrays),)
    *arguments, cotangent = arrays
    if facts.is_per_token:
        out, pull = jax.vjp(function, *arguments)
    else:
        out, pull = jax.vjp(lambda *qkv: function(*qkv, arguments[3]), *arguments[:3])
    return (out, *pull(cotangent.astype(out.dtype)))


def chain(function: Callable[..., Arrays], *sets: Arrays) -> tuple[Arrays, ...]:
    """Returns the results of every set, one computed after the other: nothing is merged."""
    results: list[Arrays] = []
    for arrays in sets:
        if results:
            arrays, _ = jax.lax.optimization_barrier((arrays, results[-1]))
        results.append(function(*arrays))
    return tuple(results)


def cut(x: Any) -> np.ndarray:
    """Returns the first tokens of the last row, of the first and the last head, as float64."""
    if x.ndim > 1:
        x = x[-1:, :ERROR_TOKENS]
        x = x[:, :, [0, -1]]
    else:
        x = x[np.array([0, -1])]
    return np.asarray(x).astype(np.float64)


def _reference(arrays: Sequence[np.ndarray], facts: Facts, is_softmax: bool) -> list[np.ndarray]:
    """Returns float64 results of the definition on the CPU, but for what needs cut tokens."""
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        run = _reference_function(is_softmax, facts.is_per_token, facts.for_training)
        results = [np.asarray(x) for x in run(*(jnp.asarray(x) for x in arrays))]
    # Gradients of keys and values need every later token.
    return results if facts.seq <= ERROR_TOKENS else results[:2]


@functools.cache
def _reference_function(is_softmax: bool, is_per_token: bool, for_training: bool):
    name = SOFTMAX + "dense" if is_softmax else "reference"
    facts = Facts("cpu", "", "float64", 0, 0, 0, 0, 0, is_per_token, for_training)
    return jax.jit(functools.partial(one_call, form(name, for_training), facts))


def error_fields(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> Fields:
    """Returns the largest errors among the arrays, each over the rms of what was expected.

    max_error is None, and non_finite_fraction given, where something is not a number.
    """
    largest, mean_square = 0.0, 0.0
    for x, y in zip(actual, expected, strict=False):  # expected may have fewer
        if not np.isfinite(x).all():
            lost = float(np.mean(~np.isfinite(x)))
            return {"max_error": None, "rel_rms_error": None, "non_finite_fraction": lost}
        scale = math.sqrt(np.mean(y**2)) + 1e-30
        largest = max(largest, float(np.abs(x - y).max()) / scale)
        mean_square = max(mean_square, float(np.mean((x - y) ** 2)) / scale**2)
    return {
        "max_error": float(f"{largest:.3e}"),
        "rel_rms_error": float(f"{math.sqrt(mean_square):.3e}"),
    }
