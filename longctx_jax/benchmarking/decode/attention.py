"""Part "attention" of the suite `decode`: one query against a cache, by implementation.

A run goes through N_LAYERS layers, as a decoded token does, each with its part of one ring (or all
with the same rows), and the next query depends on the last result. A time is that of a layer. A
kernel reads its part where it lies; what XLA makes of it may copy it first, which is the point of
measuring both. Beside each time stands its floor: what is cached, read once.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from longctx_jax.benchmarking import roofline
from longctx_jax.benchmarking.ratios import speed_ratio
from longctx_jax.benchmarking.rows import Fields, Row, make
from longctx_jax.benchmarking.timing import Case, Limits
from longctx_jax.ops.attention import Keys
from longctx_jax.ops.cache_attention import (
    IMPLEMENTATIONS,
    Cached,
    Facts,
    attend_cache,
)
from longctx_jax.ops.dispatch import capability

N_LAYERS = 8
CONTEXT_LENS = (4096, 32_768, 131_072)
CPU_CONTEXT_LENS = (4096, 32_768)
BATCH_SIZES = (1, 8)
MAX_BYTES = {"cpu": 2**30}
MAX_BYTES_ELSEWHERE = 2**36
BASELINE = "xla"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Heads and widths; d_value 0 = rows that are keys and values of all layers."""

    heads: int
    kv_heads: int
    d_key: int
    d_value: int = 0


# Of the 1 B shape: 32 heads of 64, d_model 2,048. "rows": InAttention's, whole and narrow.
SHAPES = {
    "mha": Shape(32, 32, 64, 64),
    "gqa-8": Shape(32, 8, 64, 64),
    "mqa": Shape(32, 1, 64, 64),
    "rows of 2048": Shape(32, 1, 2048),
    "rows of 512": Shape(32, 1, 512),
}
SMALL = {"gqa-8": Shape(4, 2, 16, 16), "rows of 512": Shape(4, 1, 32)}


def attention_rows(limits: Limits) -> Iterator[Row]:
    """Yields a row a (shape, context, batch, implementation), and the ratios to XLA."""
    is_cpu = jax.default_backend() == "cpu"
    dtype = "float32" if is_cpu else "bfloat16"
    contexts = limits.lengths or (
        (32,) if limits.is_quick else CPU_CONTEXT_LENS if is_cpu else CONTEXT_LENS
    )
    top = roofline.ceiling(jax.devices()[0].device_kind, dtype, is_quick=limits.is_quick)
    most = MAX_BYTES.get(jax.default_backend(), MAX_BYTES_ELSEWHERE)
    for name, shape in (SMALL if limits.is_quick else SHAPES).items():
        for context_len in contexts:
            for batch_size in BATCH_SIZES:
                fields = {
                    "pattern": (name,),
                    "variant": name,
                    "dtype": dtype,
                    **dataclasses.asdict(shape),
                    "context_len": context_len,
                    "batch_size": batch_size,
                }
                n_bytes = layer_bytes(shape, batch_size, context_len, dtype)
                copies = 1 if shape.d_value == 0 else N_LAYERS
                if copies * n_bytes > most:
                    about = {"name": f"attention {name}", **fields}
                    yield make(about, {"skipped": f"{n_bytes} bytes"})
                    continue
                yield from _measured(shape, fields, n_bytes, top, limits)


def layer_bytes(shape: Shape, batch_size: int, context_len: int, dtype: str) -> int:
    """Returns what a layer must read: every key and value, or row, once."""
    width = shape.kv_heads * (shape.d_key + shape.d_value)
    return batch_size * context_len * width * jnp.dtype(dtype).itemsize


def implementations(shape: Shape, context_len: int, dtype: str) -> list[str]:
    """Returns the names of what can run here."""
    facts = Facts(
        platform=jax.default_backend(),
        capability=capability(),
        dtype=dtype,
        query_len=1,
        key_len=context_len,
        d_key=shape.d_key,
        d_value=shape.d_value or shape.d_key,
    )
    return [i.name for i in IMPLEMENTATIONS if not i.unsupported(facts)]


def _measured(shape: Shape, fields: Fields, n_bytes: int, top, limits: Limits) -> Iterator[Row]:
    batch_size, context_len, dtype = (
        fields[name] for name in ("batch_size", "context_len", "dtype")
    )

    @functools.cache
    def inputs():
        return make_inputs(shape, batch_size, context_len, dtype)

    cases = {
        name: Case(
            jax.jit(functools.partial(through_layers, implementation=name)),
            lambda _: inputs(),
            n_inner=N_LAYERS,
        )
        for name in implementations(shape, context_len, dtype)
    }
    measured = limits.measure(cases)
    n_flops = 2 * batch_size * context_len * shape.heads * (shape.d_key + _d_value(shape))
    for name, (row, _) in measured.items():
        about = {"name": f"attention {fields['variant']} {name}", **fields, "implementation": name}
        floor = roofline.floor_fields(n_bytes, n_flops, batch_size, row["median_ms"], top)
        yield make(about, row | floor)
    for name in measured:
        if name != BASELINE:
            about = {"name": f"ratio attention {fields['variant']} {name} / {BASELINE}", **fields}
            about["baseline"] = BASELINE
            yield make(about, speed_ratio(measured[name][1], measured[BASELINE][1]))


def _d_value(shape: Shape) -> int:
    return shape.d_value or shape.d_key


def make_inputs(shape: Shape, batch_size: int, context_len: int, dtype: str):
    """Returns a query [batch, 1, heads, key], and all layers' keys and values (of rows None)."""
    keys = iter(jax.random.split(jax.random.key(0), 3))

    def normal(*sizes):
        return jax.random.normal(next(keys), sizes, dtype)

    query = normal(batch_size, 1, shape.heads, shape.d_key)
    if not shape.d_value:
        return query, normal(batch_size, 1, context_len, shape.d_key), None
    ring = (N_LAYERS, batch_size, shape.kv_heads, context_len)
    return query, normal(*ring, shape.d_key), normal(*ring, shape.d_value)


def through_layers(query, key, value, *, implementation: str) -> jax.Array:
    """Returns the query after attending to each layer's cache, one after another."""
    positions = jnp.arange(key.shape[-2], dtype=jnp.int32)[None]
    where = Keys(positions[:, -1:], positions)

    def layer(number, query):
        rows = Cached(key, None, key.shape[-1])
        cached = rows if value is None else Cached(key, value, value.shape[-1], number)
        return query + attend_cache(query, cached, where, implementation=implementation).out

    return jax.lax.fori_loop(0, N_LAYERS, layer, query)
