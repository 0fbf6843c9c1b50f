"""What the choice of an algorithm may depend on: static facts of one call."""

import dataclasses
from typing import Any

import jax

from longctx_jax.ops.dispatch import capability, platform


@dataclasses.dataclass(frozen=True)
class Facts:
    """Shapes, dtype and device of a call, hashable.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        device: its kind as jax names it, e.g. "NVIDIA H200".
        dtype: of query, key and value; "a/b/c" where they differ.
        capability: of an NVIDIA device, e.g. "9.0"; "" where unknown.
        is_per_token: the decay differs from token to token.
        matmul_precision: jax's default for float32 products when the call is traced.
        for_training: the time of forward and backward pass counts, not of the forward pass alone.
    """

    platform: str
    device: str
    dtype: str
    batch: int
    seq: int
    heads: int
    d_key: int
    d_value: int
    is_per_token: bool = False
    for_training: bool = True
    matmul_precision: str = "default"
    capability: str = ""


def facts_of(
    query: Any,
    key: Any,
    value: Any,
    log_decay: Any,
    for_training: bool,
    *,
    state: Any = None,
    reset: Any = None,
) -> Facts:
    """Returns the facts of a call with these arrays, or anything with their shapes and dtypes.

    Raises:
        ValueError: if a number of heads does not divide the largest one, or shapes contradict.
    """
    if query.shape[1] == 0:
        raise ValueError("decay_attention: needs a token: got a sequence of length 0")
    counts = {
        "query": query.shape[2],
        "key": key.shape[2],
        "value": value.shape[2],
        "log_decay": log_decay.shape[-1],
    }
    heads = max(counts.values())
    for name, count in counts.items():
        if heads % count:
            raise ValueError(
                f"decay_attention: every number of heads must divide the largest, {heads}: "
                f"{name} has {count}; repeat or regroup the heads of {name}"
            )
    if len({x.shape[:2] for x in (query, key, value)}) != 1 or query.shape[3] != key.shape[3]:
        raise ValueError(
            "decay_attention: query and key must be [batch, seq, heads, key] and value "
            f"[batch, seq, heads, value]: got {query.shape}, {key.shape}, {value.shape}; "
            "time comes before heads"
        )
    if len(log_decay.shape) not in (1, 3) or log_decay.shape[:-1] not in ((), query.shape[:2]):
        raise ValueError(
            "decay_attention: log_decay must be [heads] or [batch, seq, heads]: got "
            f"{log_decay.shape} with query {query.shape}; it is the log of what a token keeps"
        )
    wanted = (query.shape[0], heads, query.shape[3], value.shape[3])
    if state is not None and state.shape != wanted:
        raise ValueError(
            f"decay_attention: state must be [batch, heads, key, value] = {wanted}: got "
            f"{state.shape}; it has as many heads as the result"
        )
    if reset is not None and reset.shape != query.shape[:2]:
        raise ValueError(
            f"decay_attention: reset must be [batch, seq] = {query.shape[:2]}: got {reset.shape}"
        )
    dtypes = [str(x.dtype) for x in (query, key, value)]
    return Facts(
        platform=platform(),
        device=jax.local_devices()[0].device_kind,
        dtype=dtypes[0] if len(set(dtypes)) == 1 else "/".join(dtypes),
        batch=query.shape[0],
        seq=query.shape[1],
        heads=heads,
        d_key=query.shape[3],
        d_value=value.shape[3],
        is_per_token=len(log_decay.shape) == 3,
        for_training=for_training,
        matmul_precision=getattr(jax.config, "jax_default_matmul_precision", None) or "default",
        capability=capability(),
    )
