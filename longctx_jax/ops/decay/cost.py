"""What each form of decay attention should cost on a device: floating-point work, bytes, steps.

    time = max(flops / rate, bytes / bandwidth) + loop steps and launches times what one takes

A model, meant to order the forms where nothing has been measured (`table.py` has measurements); its
constants are round numbers of a device class, not of one machine. docs/decay.md derives the counts.
"""

import dataclasses

from longctx_jax.ops.decay.facts import Facts
from longctx_jax.ops.decay.kernel_inputs import segment_count

CHUNK_LEN = 64


@dataclasses.dataclass(frozen=True)
class Device:
    """Round numbers of a class of devices."""

    matrix_flops: float  # a second, in the 16-bit matrix units
    matrix_flops_32: float  # a second, float32 products as XLA runs them
    vector_flops: float  # a second
    bandwidth: float  # bytes a second
    launch_s: float  # one kernel of an XLA program
    step_s: float  # one step of an XLA loop
    walk_s: float  # one chunk of a fused kernel's loop: the latency of its chain of products
    n_units: int  # multiprocessors or cores
    cache_bytes: float  # what a walked state may take before every step goes to memory


DEVICES = {
    "gpu": Device(500e12, 250e12, 50e12, 3e12, 3e-6, 12e-6, 1.7e-6, 132, 3e7),
    "tpu": Device(300e12, 50e12, 10e12, 1.5e12, 2e-6, 5e-6, 1e-6, 1, 1e7),
    "cpu": Device(5e10, 5e10, 5e10, 1e10, 2e-6, 1.5e-6, 5e-6, 1, 1e6),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of the forward pass; the backward pass of every form is two to three times it."""

    matrix_flops: float
    vector_flops: float
    bytes: float
    steps: float  # sequential steps of an XLA loop
    launches: int = 6  # kernels outside loops
    walked_bytes: float = 0.0  # the state in and out of every step but one
    walk: float = 0.0  # chunks a block of a fused kernel walks
    n_blocks: float = 1e9  # independent blocks of a fused kernel


def cost(name: str, facts: Facts) -> Cost:
    """Returns the counts of one form's forward pass.

    Raises:
        KeyError: if the form has no model.
    """
    n = float(facts.batch * facts.heads * facts.seq)
    k, v, seq = facts.d_key, facts.d_value, facts.seq
    item = 2 if facts.dtype == "bfloat16" else 4
    chunk = min(CHUNK_LEN, seq)
    n_chunks = -(-seq // chunk)
    # Query, key, value in, output out, state in and out: every form moves these.
    ends = n * item * (2 * k + 2 * v) + 8 * facts.batch * facts.heads * k * v
    tiles = 2 * n * chunk * (k + v) + 4 * n * k * v  # flops of a chunked form
    states = 4 * n * k * v / chunk  # bytes of one float32 state a chunk
    scores = n * chunk * (4 + 4 + item)  # scores, mask and cast scores through memory
    tile = 0.0 if facts.platform == "cpu" else scores  # one tile at a time stays in a CPU's cache
    squares = n * seq * (4 + 4 + item)
    steps = seq if seq > 1 else 0
    walked = 8 * (n - n / seq) * k * v
    kept = walked if facts.for_training else 0.0  # states that reverse mode saves
    log_chunks = max(n_chunks - 1, 1).bit_length()
    # A block of 64 value columns; few rows are cut into segments, which reads key and value twice.
    rows = facts.batch * facts.heads * -(-v // 64)
    n_segments = segment_count(rows, n_chunks)
    twice = n * item * (k + v) if n_segments > 1 else 0.0
    launches = 4 if n_segments > 1 else 1
    kernel = Cost(
        tiles, 0, ends + twice, 0, launches, 0.0, n_chunks / n_segments, rows * n_segments
    )
    return {
        "reference": Cost(0, 2 * n * seq * (k + v) + 4 * n * k * v, ends + 3 * squares, 0),
        "quadratic": Cost(2 * n * seq * (k + v) + 4 * n * k * v, 0, ends + squares, 0),
        "recurrent": Cost(0, 6 * n * k * v, ends + kept, steps, 2, walked),
        "causal_dot_product": Cost(0, 6 * n * k * v, ends, steps, 6, walked),
        "block": Cost(tiles, 0, ends + tile, 3 * n_chunks),
        "chunked": Cost(tiles, 0, ends + tile, 3 * n_chunks),
        "recursion": Cost(
            tiles + 2 * n * k * v * log_chunks,
            0,
            ends * log_chunks + scores,
            0,
            6 + 5 * log_chunks,
        ),
        "fleet": Cost(0, 8 * n * k * v, 12 * n * k * v, k * 2 * seq.bit_length()),
        "prefix": Cost(tiles, 0, ends + 2 * scores + 8 * states, 2 * log_chunks),
        "two_pass": Cost(tiles, 0, ends + 2 * scores + 4 * states, n_chunks),
        "pallas_triton": kernel,
        "pallas_mosaic_gpu": kernel,
    }[name]


def seconds(name: str, facts: Facts) -> float:
    """Returns the modelled time of a call, with its backward pass if facts.for_training."""
    device = DEVICES.get(facts.platform, DEVICES["cpu"])
    c = cost(name, facts)
    rate = device.matrix_flops if facts.dtype == "bfloat16" else device.matrix_flops_32
    work = c.matrix_flops / rate + c.vector_flops / device.vector_flops
    state_bytes = 4 * facts.batch * facts.heads * facts.d_key * facts.d_value
    n_bytes = c.bytes + (c.walked_bytes if state_bytes > device.cache_bytes else 0.0)
    moved = n_bytes / device.bandwidth
    time = work + moved if facts.platform == "cpu" else max(work, moved)  # a CPU overlaps little
    time += c.steps * device.step_s
    if c.walk:  # blocks beyond what the device holds at once take turns
        waves = max(1.0, c.n_blocks / (2 * device.n_units))
        time = max(time, c.walk * device.walk_s * waves)
    return (4 if facts.for_training else 1) * (time + c.launches * device.launch_s)
