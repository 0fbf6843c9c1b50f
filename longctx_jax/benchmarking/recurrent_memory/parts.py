"""Parts of the suite `memory`: one long input through segments with memory, and attention.

"lengths" (a prefill of growing length: full attention, ARMT one cell after another, ARMT by
diagonals, and the ideal even load), "groups" (time of one diagonal by its number of cells, and
what a whole run should take by it), "long" (a prefill in pieces, whose memory does not grow),
"drift" (how far bfloat16 logits of the two orders lie apart), "train" (a full update). Every case
is compiled: "sequential" is a scan over segments around a scan over layers, the honest baseline.
The output matrix is left out, as in the paper's tables; weights are in the dtype of matrix
products. Memory's values are random: fresh ones would write zeros.

Source of shapes and questions: Sivtsov et al. (2025), arXiv 2506.05229.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longctx_jax.accounting import flops
from longctx_jax.benchmarking.launches import count_launches
from longctx_jax.benchmarking.model_cases import shape_fields, speed_fields, train_case
from longctx_jax.benchmarking.ratios import speed_ratio
from longctx_jax.benchmarking.rows import Fields, Row, make, within
from longctx_jax.benchmarking.timing import Case, Limits
from longctx_jax.models import build_model
from longctx_jax.models.decoder import Decoder
from longctx_jax.models.recurrent_memory.cells import LayerCache, Rows
from longctx_jax.models.recurrent_memory.state import init_state, make_layers
from longctx_jax.models.schedules.diagonal import diagonal_cells
from longctx_jax.models.stack import layer_names
from longctx_jax.nn.contract import Documents

PIECE = 32  # segments
IDEAL = "ideal even load"
SMALL = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 32}
ON_CPU = {"n_layers": 8, "d_model": 64, "n_heads": 4, "d_ff": 192}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of the suite on one kind of device.

    Attributes:
        shapes: names and fields of models.
        memory_len: memory tokens a segment.
    """

    shapes: Mapping[str, Mapping[str, Any]]
    segment_lens: tuple[int, ...]
    lengths: tuple[int, ...]
    long_lengths: tuple[int, ...]
    memory_len: int
    dtype: str


def setting(
    platform: str, limits: Limits, shapes: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> Setting:
    """Returns the sizes for a platform: tiny when quick."""
    if limits.is_quick:
        found = Setting({"tiny": SMALL}, (8,), (32,), (256, 512), 2, "float32")
    elif platform == "cpu":
        lengths = (512, 1024, 2048, 4096, 8192, 16_384)
        found = Setting({"small": ON_CPU}, (64,), lengths, (4096, 16_384, 65_536), 8, "float32")
    else:
        lengths = tuple(2**k for k in range(12, 18))
        long = (131_072, 524_288, 1_048_576)
        found = Setting(shapes, (512, 1024, 2048, 4096), lengths, long, 128, "bfloat16")
    return dataclasses.replace(found, lengths=limits.lengths) if limits.lengths else found


def memory_rows(
    config: Any,
    limits: Limits,
    parts: Sequence[str],
    *,
    shapes: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Iterator[Row]:
    """Yields the rows of the suite, part after part.

    Args:
        config: a whole config, of which the part "train" takes optim and train.loss_chunk_len.
        limits: how long to measure.
        parts: which to run.
        shapes: names and sizes (fields of config.model) of models to measure on a GPU.
    """
    sizes = setting(jax.default_backend(), limits, shapes)
    run = {
        "lengths": _lengths_part,
        "groups": _groups_part,
        "long": _long_part,
        "drift": _drift_part,
        "train": functools.partial(_train_part, config),
    }
    for part in parts:
        for name, fields in sizes.shapes.items():
            yield from within(run[part](sizes, limits, fields), part=part, shape=name)


def make_models(sizes: Setting, fields: Mapping[str, Any], segment_len: int) -> dict[str, Decoder]:
    """Returns full attention, and ARMT in both orders, with these sizes."""
    common = {**fields, "vocab_size": 256, "dtype": sizes.dtype}
    memory = {"segment_len": segment_len, "n_memory_tokens": sizes.memory_len}
    armt = {**common, "name": "recurrent_memory", "memory": memory}
    return {
        "full attention": build_model(common),
        "armt sequential": build_model({**armt, "schedule": "sequential"}),
        "armt diagonal": build_model({**armt, "schedule": "diagonal"}),
    }


@functools.lru_cache(maxsize=2)
def make_variables(model: Decoder) -> Any:
    """Returns random variables in the model's dtype, with memories that are not zero."""
    variables = model.init(jax.random.key(0))
    params = dict(variables["params"])
    if "memory" in params:
        leaves, tree = jax.tree.flatten(params["memory"])
        keys = jax.random.split(jax.random.key(1), len(leaves))
        scale = model.config.d_model**-0.5
        leaves = [scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        params["memory"] = jax.tree.unflatten(tree, leaves)
    return {**variables, "params": jax.tree.map(lambda x: x.astype(model.config.dtype), params)}


def weights_of(model: Decoder) -> Any:
    """Returns `make_variables`; the two orders of a model share them."""
    config = model.config
    if config.recurrence != "none":
        model = Decoder(dataclasses.replace(config, schedule="sequential"))
    return make_variables(model)


def prefill_case(model: Decoder, seq: int, piece_len: int = 0) -> Case:
    """Returns the pass of one row over seq tokens, from an empty state to its last activation.

    The state comes back, so memory does its last write too. Full attention gets no cache: filling
    one costs time, and rules out the fastest kernel.

    Args:
        piece_len: tokens a call, a divisor of seq; 0 = one call.
    """
    rng = np.random.default_rng(0)

    def prefill(variables, tokens, cache):
        def piece(cache, tokens):
            out = model.hidden(variables, tokens[None], cache)
            return out.cache, out.hidden[:, -1]

        if cache is None:
            return model.hidden(variables, tokens).hidden[:, -1], None
        cache, last = jax.lax.scan(piece, cache, tokens.reshape(-1, piece_len or seq))
        return last[-1], cache

    def make_inputs(last):
        del last
        tokens = jnp.asarray(rng.integers(0, model.config.vocab_size, (1, seq), np.int32))
        has_state = model.config.recurrence != "none"
        return weights_of(model), tokens, model.init_cache(1, seq) if has_state else None

    def inspect(inputs, output):
        # Of the pass without a state, which has no branches for streams that stand elsewhere.
        del output
        whole = jax.jit(lambda variables, tokens: model.hidden(variables, tokens).hidden[:, -1])
        return {"launches": count_launches(whole.lower(*inputs[:2]).compile())}

    return Case(
        jax.jit(prefill, donate_argnums=2),
        make_inputs,
        keeps_output=False,
        inspect=None if piece_len else inspect,
    )


def group_case(model: Decoder, n_cells: int, n_steps: int) -> Case:
    """Returns n_steps diagonals of n_cells cells each: no ramp, no masks, all lanes at work.

    What comes out of a cell goes into the same cell: equal work, without the shift.
    """
    config = model.config
    (layer,), (name,) = make_layers(config), layer_names(config)
    memory = config.memory

    def run(variables, rows, cache):
        params = variables["params"]
        stack = jax.tree.map(lambda x: x[:n_cells], params["stack"][name])
        extra = jax.tree.map(lambda x: x[:n_cells], params["memory"]["layers"][name])
        stacked = (stack, None, jnp.arange(n_cells)), extra

        def step(carry, _):
            rows, cache = carry
            rows, cache, _ = jax.vmap(layer.whole)(stacked, rows, cache)
            return (rows, cache), None

        carry, _ = jax.lax.scan(step, (rows, cache), length=n_steps)
        return carry

    def make_inputs(last):
        del last
        key = jax.random.key(0)
        shape = (n_cells, 1, memory.segment_len, config.d_model)
        tokens = jax.random.normal(key, shape, config.dtype)
        rows = Rows(
            tokens,
            tokens[:, :, : memory.n_memory_tokens],
            Documents(jnp.zeros(shape[:3], jnp.int32), None),
            jnp.ones((n_cells,), jnp.int32),
        )
        state = init_state(config, 1, 1).layers[0]
        cache = LayerCache((), jax.tree.map(lambda x: x[:n_cells], state.memory))
        return weights_of(model), rows, cache

    return Case(jax.jit(run), make_inputs, n_inner=n_steps, keeps_output=False)


def _about(model: Decoder, seq: int) -> Fields:
    config = model.config
    row = shape_fields(config, 1, seq)
    if config.recurrence == "none":
        return {**row, "segment_len": seq, "n_segments": 1}
    n_segments = seq // config.memory.segment_len
    return {
        **row,
        "segment_len": config.memory.segment_len,
        "n_memory_tokens": config.memory.n_memory_tokens,
        "schedule": config.schedule,
        "n_segments": n_segments,
    }


def _cells(model: Decoder, seq: int) -> Fields:
    """Returns how many cells a run evaluates, and how many of them do work."""
    config = model.config
    if config.recurrence == "none":
        return {}
    n_segments = seq // config.memory.segment_len
    cells = run = n_segments * config.n_layers
    if config.schedule == "diagonal":
        run = diagonal_cells(n_segments, config.n_layers, 1, config.n_ramp_buckets)
    return {"useful_cells": cells, "cells": run}


def _lengths_part(sizes: Setting, limits: Limits, fields: Mapping[str, Any]) -> Iterator[Row]:
    for segment_len in sizes.segment_lens:
        models = make_models(sizes, fields, segment_len)
        n_layers = models["armt diagonal"].config.n_layers
        even = limits.measure({IDEAL: group_case(models["armt diagonal"], n_layers, 4)})
        for seq in sizes.lengths:
            if seq < 2 * segment_len:
                continue
            cases = {name: prefill_case(model, seq) for name, model in models.items()}
            measured = limits.measure(cases)
            for name, (row, _) in measured.items():
                case = {"name": name, "pass": "prefill", **_about(models[name], seq)}
                yield make(case, _cells(models[name], seq) | row | _speed(models[name], seq, row))
            about = _about(models["armt diagonal"], seq)
            n_segments = seq // segment_len
            ideal = even[IDEAL][0]
            ideal = {k: v * n_segments if k.endswith("_ms") else v for k, v in ideal.items()}
            speed = _speed(models["armt diagonal"], seq, ideal)
            yield make({"name": IDEAL, "pass": "prefill", **about}, ideal | speed)
            times = {name: seconds for name, (_, seconds) in measured.items()}
            times[IDEAL] = np.full(1, ideal["median_ms"] / 1e3)
            yield from _ratios(times, about)


def _speed(model: Decoder, seq: int, row: Fields) -> Fields:
    if "median_ms" not in row:
        return {}
    return speed_fields(row, seq, flops.forward_flops_per_token(model.config, seq))


def _ratios(times: Mapping[str, np.ndarray], about: Fields) -> Iterator[Row]:
    """Yields how many times as fast the diagonal order is as each of the others."""
    ours = times.get("armt diagonal", np.zeros(0))
    for name, theirs in times.items():
        if name != "armt diagonal" and (ratio := speed_ratio(ours, theirs)):
            yield make({"name": f"ratio armt diagonal / {name}", "other": name, **about}, ratio)


def _groups_part(sizes: Setting, limits: Limits, fields: Mapping[str, Any]) -> Iterator[Row]:
    """Yields tau(g): the time of a diagonal of g cells, and the bound L tau(1) / tau(L)."""
    for segment_len in sizes.segment_lens:
        model = make_models(sizes, fields, segment_len)["armt diagonal"]
        n_layers = model.config.n_layers
        groups = sorted({1, *(2**k for k in range(1, 7) if 2**k < n_layers), n_layers})
        cases = {str(g): group_case(model, g, 4) for g in groups}
        for name, (row, _) in limits.measure(cases).items():
            n_cells = int(name)
            about = _about(model, segment_len)
            layer_flops = flops.forward_flops_per_token(model.config, segment_len)
            speed = speed_fields(row, segment_len * n_cells / n_layers, layer_flops)
            per_cell = {"cell_ms": round(row["median_ms"] / n_cells, 5)}
            case = {"name": "diagonal", "pass": "group", **about, "n_cells": n_cells}
            yield make(case, row | speed | per_cell)


def _long_part(sizes: Setting, limits: Limits, fields: Mapping[str, Any]) -> Iterator[Row]:
    """Yields a prefill in pieces of PIECE segments: ramps for each, and memory that is flat."""
    segment_len = sizes.segment_lens[min(1, len(sizes.segment_lens) - 1)]
    models = make_models(sizes, fields, segment_len)
    models = {name: models[name] for name in ("armt sequential", "armt diagonal")}
    for seq in sizes.long_lengths:
        piece_len = PIECE * segment_len
        cases = {name: prefill_case(model, seq, piece_len) for name, model in models.items()}
        for name, (row, _) in limits.measure(cases).items():
            about = {"name": name, "pass": "pieces", **_about(models[name], seq)}
            about["piece_len"] = piece_len
            yield make(about, _cells(models[name], seq) | row | _speed(models[name], seq, row))


def _drift_part(sizes: Setting, limits: Limits, fields: Mapping[str, Any]) -> Iterator[Row]:
    """Yields the relative L2 distance of bfloat16 logits, diagonal from sequential order."""
    del limits
    segment_len = sizes.segment_lens[0]
    models = make_models(dataclasses.replace(sizes, dtype="bfloat16"), fields, segment_len)
    counts = [n for n in (1, 2, 4, 8, 16, 32) if n * segment_len <= max(sizes.lengths)]
    rng = np.random.default_rng(0)
    weights = weights_of(models["armt sequential"])
    for n in counts:
        tokens = jnp.asarray(rng.integers(0, 256, (1, n * segment_len), np.int32))
        logits = [
            np.asarray(models[f"armt {order}"].apply(weights, tokens).logits)
            for order in ("sequential", "diagonal")
        ]
        error = np.linalg.norm(logits[1] - logits[0]) / np.linalg.norm(logits[0])
        changed = np.mean(np.argmax(logits[0], -1) != np.argmax(logits[1], -1))
        about = _about(models["armt diagonal"], n * segment_len)
        drift = {"relative_error": float(error), "changed_argmax": float(changed)}
        case = {"name": "drift", "pass": "forward", **about, "dtype": "bfloat16"}
        yield make(case, drift)


def _train_part(
    config: Any, sizes: Setting, limits: Limits, fields: Mapping[str, Any]
) -> Iterator[Row]:
    """Yields a full update of one row, at a few segments: back-propagation through all of them."""
    segment_len = sizes.segment_lens[0]
    models = make_models(dataclasses.replace(sizes, dtype="float32"), fields, segment_len)
    for seq in [n for n in sizes.lengths if 4 * segment_len <= n <= 32 * segment_len][:2]:
        cases = {
            name: train_case(config, model, 1, seq, has_documents=False)
            for name, model in models.items()
        }
        measured = limits.measure(cases)
        for name, (row, _) in measured.items():
            per_token = flops.train_flops_per_token(models[name].config, seq)
            speed = speed_fields(row, seq, per_token) if "median_ms" in row else {}
            case = {"name": name, "pass": "train", **_about(models[name], seq)}
            yield make(case, _cells(models[name], seq) | row | speed)
        times = {name: seconds for name, (_, seconds) in measured.items()}
        about = {**_about(models["armt diagonal"], seq), "pass": "train"}
        yield from _ratios(times, about)
