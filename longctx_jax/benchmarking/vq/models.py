"""Whole models of the suite `vq`: updates by length, and decoding after long contexts.

Models are those of the paper's speed tables (24 layers x 768, where a layer of gated heads is two
units), scaled down on a CPU: vector-quantised attention in its linear and its quadratic form,
and a transformer of exact attention. Decoding starts from a state that is made up: its counts and
its position say how much came before; what it holds does not change what a token costs.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from longctx_jax.accounting import flops
from longctx_jax.accounting.caches import cache_bytes
from longctx_jax.benchmarking import timing
from longctx_jax.benchmarking.model_cases import (
    BASELINE,
    shape_fields,
    speed_fields,
    train_case,
)
from longctx_jax.benchmarking.ratios import speed_ratio
from longctx_jax.benchmarking.rows import Fields, Row, make
from longctx_jax.benchmarking.timing import Case, Limits
from longctx_jax.decoding import cast_weights
from longctx_jax.decoding.greedy import token_loop
from longctx_jax.models import build_model
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.decoder import Decoder, ModelCache
from longctx_jax.nn.kv_cache import KVCache
from longctx_jax.nn.mixers.vq import VQConfig
from longctx_jax.ops.vq import VQState

CONTEXT_LENS = (1024, 8192, 65_536, 1_048_576)
N_NEW = 64
MODEL_RUNS = 10
CPU_CACHE_BYTES = 2**30  # larger ones take minutes there


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the models on one kind of device; n_tokens are those of an update."""

    n_layers: int
    d_model: int
    d_key: int
    n_codes: int
    block_len: int
    dtype: str
    remat: str
    lengths: tuple[int, ...]
    n_tokens: int


def sizes(platform: str, limits: Limits) -> Sizes:
    """Returns the sizes for a platform: tiny when quick."""
    if limits.is_quick:
        found = Sizes(1, 32, 16, 8, 16, "float32", "none", (48,), 96)
    elif platform == "cpu":
        found = Sizes(2, 128, 64, 128, 128, "float32", "none", (1024, 4096), 4096)
    else:
        lengths = (2048, 8192, 32_768, 131_072)
        found = Sizes(24, 768, 128, 512, 512, "bfloat16", "full", lengths, 65_536)
    return dataclasses.replace(found, lengths=limits.lengths) if limits.lengths else found


def make_model(size: Sizes, head_type: str, form: str) -> Decoder:
    """Returns the model of a form: an implementation, or "transformer".

    The transformer beside gated heads is that of many heads: they have no other exact form.
    """
    is_gated = head_type == "shga" and form != BASELINE
    n_heads = 1 if is_gated else size.d_model // size.d_key
    vq = VQConfig(
        codebook_size=size.n_codes,
        window_len=size.block_len,
        block_len=size.block_len,
        gate="silu" if is_gated else "none",
        implementation="auto" if form == BASELINE else form,
        search="xla" if form in ("linear", "quadratic") else "auto",
    )
    config = ModelConfig(
        name="transformer" if form == BASELINE else "transformer_vq",
        n_layers=2 * size.n_layers if is_gated else size.n_layers,
        d_model=size.d_model,
        n_heads=n_heads,
        n_kv_heads=1 if head_type == "mqa" else n_heads,
        d_key=size.d_key,
        d_value=2 * size.d_model if is_gated else size.d_key,
        mlp="none" if is_gated else "relu2",
        d_ff=(5 if head_type == "mqa" else 4) * size.d_model,
        vocab_size=256,
        tie_embeddings=False,
        dtype=size.dtype,
        remat=size.remat,
        mixer_fields={"vq": vq},
    )
    return build_model(config)


def vq_fields(head_type: str, size: Sizes) -> Fields:
    """Returns the fields of a row that `shape_fields` does not have."""
    names = ("d_key", "n_codes", "block_len")
    fields = {name: getattr(size, name) for name in names}
    return {"head_type": head_type, **fields, "window_len": size.block_len}


def model_rows(config: Any, limits: Limits, heads: Sequence[str]) -> Iterator[Row]:
    """Yields whole updates of each form at each length, and how many times as fast ours are.

    Args:
        config: a whole config; its optim and train.loss_chunk_len count.
        limits: how long to measure.
        heads: head types, which to run.
    """
    platform = jax.default_backend()
    size = sizes(platform, limits)
    ours = ("linear",) if platform == "cpu" else ("auto", "linear")
    for seq in size.lengths:
        batch = max(1, size.n_tokens // seq)
        for head_type in heads:
            forms = (*ours, "quadratic", BASELINE)
            models = {form: make_model(size, head_type, form) for form in forms}
            cases = {
                form: train_case(config, model, batch, seq, has_documents=False)
                for form, model in models.items()
            }
            # Seconds each.
            measured = limits.measure_able(cases, most_runs=MODEL_RUNS, most_warmup=1)
            extra = {"pass": "train", **vq_fields(head_type, size)}
            for form, (row, _) in measured.items():
                about = shape_fields(models[form].config, batch, seq) | extra
                if "median_ms" in row:
                    per_token = flops.train_flops_per_token(models[form].config, seq)
                    row = row | speed_fields(row, batch * seq, per_token)
                yield make({"name": form, **about}, row)
            for form in ours:
                about = shape_fields(models[form].config, batch, seq) | extra
                for other in forms[len(ours) :]:
                    if ratio := speed_ratio(measured[form][1], measured[other][1]):
                        names = {"name": f"ratio {form} / {other}", "form": form, "other": other}
                        yield make(names | about, ratio)


def decode_rows(limits: Limits, heads: Sequence[str]) -> Iterator[Row]:
    """Yields the time of a token, and the memory of the state, after each length of context."""
    size = sizes(jax.default_backend(), limits)
    n_new = 4 if limits.is_quick else N_NEW
    contexts = limits.lengths or ((32, 64) if limits.is_quick else CONTEXT_LENS)
    # Exact attention is that of many heads; with one key head for all, its cache is the smallest.
    kinds = {head: (head, "auto") for head in heads}
    kinds |= {f"{BASELINE} {head}": (head, BASELINE) for head in heads if head != "shga"}
    models = {name: make_model(size, *kind) for name, kind in kinds.items()}
    limit = timing.device_bytes()
    if jax.default_backend() == "cpu":
        limit = min(limit, CPU_CACHE_BYTES)
    for context_len in contexts:
        cases, reasons = {}, {}
        for name, model in models.items():
            n_bytes = cache_bytes(model, 1, context_len + n_new)
            if 3 * n_bytes > limit:  # the state, and those before and after a step
                reasons[name] = f"its cache holds {n_bytes:,} bytes, three of them over {limit:,}"
            else:
                cases[name] = loop_case(model, context_len, n_new)
        measured = limits.measure(cases)
        for name, model in models.items():
            row = {"skipped": reasons[name]} if name in reasons else measured[name][0]
            n_bytes = cache_bytes(model, 1, context_len + n_new)
            about = {"name": name, "pass": "loop", "context_len": context_len}
            about |= {"n_new_tokens": n_new, **vq_fields(kinds[name][0], size)}
            about |= shape_fields(model.config, 1, context_len)
            if "median_ms" in row:
                middle = context_len + n_new // 2
                per_token = flops.forward_flops_per_token(model.config, 1, n_past=middle)
                row = row | speed_fields(row, n_new, per_token)
                row["token_ms"] = round(row["median_ms"] / n_new, 5)
            yield make(about, {"cache_bytes": n_bytes} | row)


def loop_case(model: Decoder, context_len: int, n_new: int) -> Case:
    """Returns the loop of n_new one-token calls after a made-up context, the same each run."""

    @functools.cache
    def start():
        variables = cast_weights(model, model.init(jax.random.key(0)))
        logits = jnp.zeros((1, model.config.vocab_size), jnp.float32)
        return variables, logits, made_up_cache(model, context_len, n_new)

    function = functools.partial(token_loop, model, n_new)
    return Case(jax.jit(function), lambda _: start(), keeps_output=False)


def made_up_cache(model: Decoder, context_len: int, n_new: int) -> ModelCache:
    """Returns the cache of one row as it stands after context_len tokens, keys and values zero."""
    cache = model.init_cache(1, context_len + n_new)

    def after(state: Any) -> Any:
        position = jnp.full_like(state.position, context_len)
        if isinstance(state, KVCache):
            slots = jnp.arange(state.slot_positions.shape[-1], dtype=jnp.int32)
            slots = jnp.where(slots < context_len, slots, state.slot_positions)
            return dataclasses.replace(state, slot_positions=slots, position=position)
        assert isinstance(state, VQState)
        n_codes = state.table.count.shape[-1]
        n_filed = max(0, context_len - state.documents.shape[-1])
        counts = n_filed // n_codes + (jnp.arange(n_codes) < n_filed % n_codes)
        table = state.table._replace(
            count=jnp.broadcast_to(counts.astype(jnp.int32), state.table.count.shape),
            document=jnp.zeros_like(state.table.document),
        )
        n_kept = min(context_len, state.documents.shape[-1])
        kept = jnp.arange(state.documents.shape[-1]) < n_kept
        documents = jnp.where(kept, 0, state.documents)
        return state._replace(table=table, documents=documents, position=position)

    return dataclasses.replace(cache, layers=tuple(after(layer) for layer in cache.layers))
