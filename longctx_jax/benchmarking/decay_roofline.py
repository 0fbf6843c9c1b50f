"""The least work of decay attention, and the most a device can do: bytes, flops, a time's fraction.

    floor = max(ideal_bytes / bandwidth, ideal_flops / rate),   roofline_fraction = floor / measured

Bytes count every input read once and every output written once; flops the chunked algorithm with 64
tokens a chunk, whatever the measured form does. A form may not beat its floor, except from a cache
that held its inputs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.benchmarking import timing
from longctx_jax.benchmarking.flops import mean_visible_keys
from longctx_jax.ops.decay.facts import Facts

CHUNK_LEN = 64  # tokens
DECAY_BYTES = 4  # log decays are float32
COPY_BYTES = 2**28  # of the measured copy, larger than a cache
MATRIX_LEN = 2048  # of the measured product


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What a device can do at most.

    Attributes:
        source: "table", or "measured" in this process by one copy and one matrix product.
    """

    bytes_per_s: float
    flops_per_s: float
    source: str


# Memory bandwidth as a copy reaches it; dense matrix products, float32 ones as TF32.
CEILINGS = {
    ("NVIDIA H200", "bfloat16"): Ceiling(4.3e12, 790e12, "table"),
    ("NVIDIA H200", "float32"): Ceiling(4.3e12, 395e12, "table"),
}


def ceiling(device: str, dtype: str, *, is_quick: bool = False) -> Ceiling:
    """Returns the ceiling of a kind of device, from the table or else measured once."""
    return CEILINGS.get((device, dtype)) or _measured_ceiling(dtype, is_quick)


@functools.cache
def _measured_ceiling(dtype: str, is_quick: bool) -> Ceiling:
    n_bytes, length = (2**16, 64) if is_quick else (COPY_BYTES, MATRIX_LEN)
    x = jnp.ones(n_bytes // 8, jnp.float32)  # half is read, half is written
    matrix = jnp.ones((length, length), dtype)
    copy = timing.measure(jax.jit(lambda x: x + 1), lambda _: (x,), n_runs=5)
    product = timing.measure(jax.jit(lambda a: a @ a), lambda _: (matrix,), n_runs=5)
    return Ceiling(
        round(1e3 * n_bytes / copy["min_ms"]),
        round(1e3 * 2 * length**3 / product["min_ms"]),
        "measured",
    )


def ideal_bytes(facts: Facts) -> int:
    """Returns the bytes of query, key, value and output; with gradients, of those that they need.

    forward:   q k v in, out out                        8 D a token and head at 2 bytes
    backward:  q k v dout in, dq dk dv out             14 D; facts.for_training counts both
    """
    n_tokens = facts.batch * facts.seq * facts.heads
    k, v = facts.d_key, facts.d_value
    width = 2 * k + 2 * v
    n_decays = 1
    if facts.for_training:
        width += (2 * k + 2 * v) + (2 * k + v)
        n_decays += 2  # read again, and its gradient written
    total = n_tokens * width * np.dtype(facts.dtype).itemsize
    return total + (n_tokens * n_decays * DECAY_BYTES if facts.is_per_token else 0)


def ideal_flops(facts: Facts) -> int:
    """Returns the flops of the chunked algorithm, chunks of C = min(64, seq) tokens.

    forward:   2 C (K + V) + 4 K V a token and head: scores, values, read and update of the state
    backward:  2 C (3 K + 2 V) + 10 K V
    """
    chunk = min(CHUNK_LEN, facts.seq)
    k, v = facts.d_key, facts.d_value
    per_token = 2 * chunk * (k + v) + 4 * k * v
    if facts.for_training:
        per_token += 2 * chunk * (3 * k + 2 * v) + 10 * k * v
    return facts.batch * facts.seq * facts.heads * per_token


def softmax_ideal_flops(facts: Facts) -> int:
    """Returns the flops of exact causal attention over visible pairs, five products backwards."""
    n_pairs = facts.batch * facts.heads * facts.seq * mean_visible_keys(facts.seq)
    k, v = facts.d_key, facts.d_value
    per_pair = 2 * (k + v) + (2 * (3 * k + 2 * v) if facts.for_training else 0)
    return round(n_pairs * per_pair)


def roofline_fields(facts: Facts, median_ms: Any, top: Ceiling, n_flops: int) -> timing.Row:
    """Returns the ideal counts, the floor, and the measured time against them."""
    n_bytes = ideal_bytes(facts)
    floor_s = max(n_bytes / top.bytes_per_s, n_flops / top.flops_per_s)
    seconds = median_ms / 1e3
    return {
        "ideal_bytes": n_bytes,
        "ideal_flops": n_flops,
        "floor_ms": round(1e3 * floor_s, 6),
        "roofline_fraction": round(floor_s / seconds, 5) if seconds else None,
        "tb_per_s": round(n_bytes / seconds / 1e12, 5) if seconds else None,
        "tflops_per_s": round(n_flops / seconds / 1e12, 4) if seconds else None,
        "ceiling_bytes_per_s": top.bytes_per_s,
        "ceiling_flops_per_s": top.flops_per_s,
        "ceiling_source": top.source,
        "tokens_per_s": round(facts.batch * facts.seq / seconds, 2) if seconds else None,
    }
