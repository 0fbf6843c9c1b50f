"""What a device can do at most, and a measured time against the least possible one.

    floor = max(ideal_bytes / bandwidth, ideal_flops / rate),   roofline_fraction = floor / measured

What is ideal depends on the op: `decay/floors.py`, `vq/cases.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from longctx_jax.benchmarking import timing
from longctx_jax.benchmarking.rows import Fields

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


def floor_fields(
    n_bytes: int, n_flops: int, n_tokens: int, median_ms: float, top: Ceiling
) -> Fields:
    """Returns the ideal counts, the floor, the measured time against them, and tokens/s."""
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
        "tokens_per_s": round(n_tokens / seconds, 2) if seconds else None,
    }
