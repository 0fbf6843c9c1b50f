"""The least work of decay attention: bytes and flops, for the floors of `roofline.py`.

Bytes count every input read once and every output written once; flops the chunked algorithm with 64
tokens a chunk, whatever the measured form does. A form may not beat its floor, except from a cache
that held its inputs.
"""

from typing import Any

import numpy as np

from longctx_jax.benchmarking.roofline import Ceiling, floor_fields
from longctx_jax.benchmarking.rows import Fields
from longctx_jax.nn.costs import mean_visible_keys
from longctx_jax.ops.decay.facts import Facts

CHUNK_LEN = 64  # tokens
DECAY_BYTES = 4  # log decays are float32


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


def roofline_fields(facts: Facts, median_ms: Any, top: Ceiling, n_flops: int) -> Fields:
    """Returns the ideal counts, the floor, and the measured time against them."""
    return floor_fields(ideal_bytes(facts), n_flops, facts.batch * facts.seq, median_ms, top)
