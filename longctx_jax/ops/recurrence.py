"""What the recurrences over tokens share: the choice of a form, and chunks in time-major order.

Each op of `ops/rwkv` and `ops/ssm` has forms with one signature: "recurrent", the definition token
by token, and others that need fewer steps one after another, or less memory for gradients.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.ops.dispatch import Implementation, choose, platform


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the choice between the forms depends on."""

    platform: str
    seq: int  # tokens


def choose_form(
    op: str, forms: Sequence[Implementation], requested: str, seq: int
) -> Callable[..., Any]:
    """Returns the form to run.

    Raises:
        ValueError: unknown name, or no token.
    """
    if seq < 1:
        raise ValueError(f"{op}: needs a token: got a sequence of length {seq}; pass at least one")
    return choose(op, forms, requested, Facts(platform(), seq)).run


def is_one_step(facts: Facts) -> str:
    """Returns why one token needs no form but the recurrent one; "" for more."""
    return "one token is one step" if facts.seq == 1 else ""


def require_chunk_len(op: str, chunk_len: int) -> None:
    """Raises ValueError unless chunk_len is at least 1."""
    if chunk_len < 1:
        raise ValueError(f"{op}: chunk_len must be at least 1: got {chunk_len}; set it above 0")


def time_first(x: jax.Array) -> jax.Array:
    """Returns [batch, seq, ...] as [seq, batch, ...], and the other way round."""
    return jnp.swapaxes(x, 0, 1)


def split_time(x: jax.Array, chunk_len: int, padding: float = 0.0) -> jax.Array:
    """Returns [batch, seq, ...] as [n_chunks, chunk_len, batch, ...], filled up at the end."""
    x = time_first(x)
    n_chunks = -(-x.shape[0] // chunk_len)
    pad = [(0, n_chunks * chunk_len - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    x = jnp.pad(x, pad, constant_values=padding)
    return x.reshape(n_chunks, chunk_len, *x.shape[1:])


def join_time(x: jax.Array, seq: int) -> jax.Array:
    """Returns [n_chunks, chunk_len, batch, ...] as [batch, seq, ...]: undoes `split_time`."""
    return time_first(x.reshape(-1, *x.shape[2:])[:seq])
