"""Softmax attention to a cache: keys with heads before slots, and values, or rows that are both.

The visibility rule and the results are those of `attention/`; what differs is where keys lie (a
head's keys are a matrix, those of all layers may be one array) and which implementations pay for a
single query.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longctx_jax.ops.attention import Keys, Partial, attention_partial, is_visible
from longctx_jax.ops.dispatch import (
    Implementation,
    capability,
    choose,
    leaf,
    leaf_unsupported,
    platform,
)
from longctx_jax.ops.position import DistanceBias

MIN_KEYS = 1024  # that "auto" starts a kernel for
MAX_RAGGED_WIDTH = 640  # wider rows must be multiples of 64


class Cached(NamedTuple):
    """Keys and values in a cache."""

    key: jax.Array  # [batch, kv_heads, keys, key]; with `layer`, [layers, batch, ...]
    value: jax.Array | None  # as key, of width d_value; None = the first d_value columns of key
    d_value: int
    layer: jax.Array | None = None  # int32 [], which of the layers' keys these are


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the choice of an implementation may depend on."""

    platform: str
    capability: str
    dtype: str
    query_len: int
    key_len: int
    d_key: int
    d_value: int


def attend_cache(
    query: jax.Array,
    cached: Cached,
    where: Keys,
    *,
    window_len: int = 0,
    relative_bias: DistanceBias | None = None,
    scale: float | None = None,
    implementation: str = "auto",
) -> Partial:
    """Returns attention of the queries to what is cached, with its log-normaliser.

    Args:
        query: [batch, seq, heads, key]; heads a multiple of kv_heads.
        cached: keys and values.
        where: positions and documents of queries and keys.
        window_len: tokens a query sees; 0 = all.
        relative_bias: added to the scores.
        scale: of the scores; None = 1/sqrt(key width).
        implementation: "auto", "xla", or "pallas_triton": one query on an NVIDIA GPU, which reads
            the visible part of the cache once and in place; its gradients are those of "xla".

    Raises:
        ValueError: unknown implementation.
        NotImplementedError: the named one cannot run here.

    Cost: 2 batch seq heads keys (key + value) flops.
    """
    facts = Facts(
        platform=platform(),
        capability=capability(),
        dtype=str(jnp.result_type(query, cached.key)),
        query_len=query.shape[1],
        key_len=cached.key.shape[-2],
        d_key=cached.key.shape[-1],
        d_value=cached.d_value,
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen = choose("attend_cache", IMPLEMENTATIONS, implementation, facts)
    return chosen.run(query, cached, where, window_len, relative_bias, scale)


def without_kernels(implementation: str) -> str:
    """Returns what a layer's choice for its own tokens means here: "dense" says "xla"."""
    return "xla" if implementation in ("dense", "blockwise") else "auto"


def _xla(query, cached: Cached, where: Keys, window_len, relative_bias, scale) -> Partial:
    """Attention as of any keys, once those of the layer are brought into its order."""

    def own(x):
        if cached.layer is not None:
            x = jax.lax.dynamic_index_in_dim(x, cached.layer, 0, keepdims=False)
        return jnp.swapaxes(x, 1, 2).astype(query.dtype)

    key = own(cached.key)
    value = key[..., : cached.d_value] if cached.value is None else own(cached.value)
    return attention_partial(
        query,
        key,
        value,
        where,
        window_len=window_len,
        relative_bias=relative_bias,
        scale=scale,
    )


def _triton(query, cached: Cached, where: Keys, window_len, relative_bias, scale) -> Partial:
    """The kernel, with the gradients of `_xla`."""
    bias = relative_bias or DistanceBias()
    arrays = (query, cached.key, cached.value, bias.table, bias.slopes)
    rules = _Rules(window_len, scale, cached.d_value, bias.max_distance, relative_bias is None)
    return _with_gradients(rules, arrays, where, cached.layer)


class _Rules(NamedTuple):
    window_len: int
    scale: float
    d_value: int
    max_distance: int
    is_plain: bool

    def bias(self, table, slopes) -> DistanceBias | None:
        return None if self.is_plain else DistanceBias(table, self.max_distance, slopes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_gradients(rules: _Rules, arrays, where: Keys, layer) -> Partial:
    query, key, value, table, slopes = arrays
    distance = where.query_positions - where.key_positions  # one query: [batch or 1, keys]
    distance = jnp.where(is_visible(where, rules.window_len)[:, 0], distance, -1)
    distance = jnp.broadcast_to(distance, (query.shape[0], distance.shape[1]))
    out, log_normalizer = leaf("flash_decoding", "attend")(
        query[:, 0],
        key,
        value,
        distance.astype(jnp.int32),
        rules.bias(table, slopes),
        scale=rules.scale,
        d_value=rules.d_value,
        layer=layer,
    )
    return Partial(out[:, None].astype(query.dtype), log_normalizer[:, None])


def _forward(rules, arrays, where, layer):
    return _with_gradients(rules, arrays, where, layer), (arrays, where, layer)


def _backward(rules: _Rules, saved, d_result):
    arrays, where, layer = saved

    def run(arrays):
        query, key, value, table, slopes = arrays
        cached = Cached(key, value, rules.d_value, layer)
        bias = rules.bias(table, slopes)
        return _xla(query, cached, where, rules.window_len, bias, rules.scale)

    _, pull = jax.vjp(run, arrays)
    return (*pull(d_result), None, None)


_with_gradients.defvjp(_forward, _backward)


def _unattractive(facts: Facts) -> str:
    if facts.key_len < MIN_KEYS:
        return f"{facts.key_len} keys are too few for a kernel to pay"
    widest = max(facts.d_key, facts.d_value)
    if widest > MAX_RAGGED_WIDTH and widest % 64:
        return f"rows of {widest} numbers are cut into parts that spill registers"
    return ""


IMPLEMENTATIONS = (
    Implementation(
        "pallas_triton",
        _triton,
        unsupported=leaf_unsupported("flash_decoding"),
        unattractive=_unattractive,
    ),
    Implementation("xla", _xla),
)
