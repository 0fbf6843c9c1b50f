"""Other libraries' decay attention on the same inputs: flash-linear-attention and LeetDecoding.

Both are PyTorch; neither is a dependency. Whatever cannot be imported or run gives a row `skipped`
with its error. The decay is spelled as each function wants it (log, rate = -log, or the factor),
and functions are called directly: LeetDecoding's dispatcher hands several of them another spelling.
On a GPU a CUDA graph of several calls is timed where the function can be captured, like our calls
inside one program; `eager_ms` is the time of one call from Python.
"""

import dataclasses
import importlib
import importlib.util
import os
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from longctx_jax.benchmarking import timing
from longctx_jax.benchmarking.decay.cases import Inputs, cut, error_fields
from longctx_jax.benchmarking.environment import without_paths
from longctx_jax.benchmarking.rows import Fields
from longctx_jax.benchmarking.timing import Limits

LEET = "leetDecoding.methods"
CUDA_PRODUCT = f"{LEET}.causal_dot_product"
CPU_SECONDS = 6.0  # of the runs of one function
GRAPH_CALLS = 10
GRAPH_BELOW_MS = 2.0  # longer calls hide their launches themselves


@dataclasses.dataclass(frozen=True)
class Peer:
    """One function of another library.

    Attributes:
        decay: how it wants the constant decays: "log", "rate", "factor", or "own": it has its own.
        is_heads_first: [batch, heads, seq, width], without a scale, instead of ours.
        has_backward: whether it has gradients.
        needs_gpu: whether it runs on a GPU only.
        takes_per_token: whether it takes a log decay a token, as `g`.
        max_seq: longest sequence to time; None = no limit. Some loop in Python, or are quadratic.
    """

    name: str
    module: str
    function: str
    decay: str
    is_heads_first: bool = True
    has_backward: bool = False
    needs_gpu: bool = False
    takes_per_token: bool = False
    max_seq: int | None = None


_FLA: dict[str, Any] = {"is_heads_first": False, "has_backward": True, "needs_gpu": True}
PEERS = (
    Peer("fla chunk_retention", "fla.ops.retention", "chunk_retention", "own", **_FLA),
    Peer(
        "fla chunk_simple_gla",
        "fla.ops.simple_gla",
        "chunk_simple_gla",
        "log",
        takes_per_token=True,
        **_FLA,
    ),
    Peer(
        "fla chunk_lightning_attn", "fla.ops.lightning_attn", "chunk_lightning_attn", "own", **_FLA
    ),
    Peer(
        "leet lightningAttention2_torch",
        f"{LEET}.lightningAttention2_torch",
        "lightningAttention2_torch",
        "rate",
        has_backward=True,
        max_seq=32_768,
    ),
    Peer("leet block-based", f"{LEET}.BlockBased", "blockBased", "rate", max_seq=8192),
    Peer(
        "leet vanilla",
        f"{LEET}.linear_attn",
        "linear_attn",
        "rate",
        has_backward=True,
        max_seq=2048,
    ),
    Peer(
        "leet causal_dot_product_torch",
        f"{LEET}.causal_dot_product_torch",
        "causal_dot_product_torch",
        "factor",
        max_seq=8192,
    ),
    Peer("leet recursion", f"{LEET}.Recursion", "recursion", "rate", max_seq=8192),
    Peer(
        "leet FleetAttention_torch",
        f"{LEET}.FleetAttention",
        "FleetAttention",
        "factor",
        has_backward=True,
        max_seq=2048,
    ),
    Peer(
        "leet lightningAttention2",
        f"{LEET}.lightningAttention2",
        "lightning_attn2",
        "rate",
        needs_gpu=True,
    ),
    Peer(
        "leet FleetAttention",
        f"{LEET}.FleetAttention_triton",
        "FleetAttention_triton",
        "factor",
        needs_gpu=True,
        max_seq=8192,
    ),
    Peer("leet causal_dot_product", CUDA_PRODUCT, "causal_dot_product", "factor", needs_gpu=True),
)


def peer_rows(inputs: Inputs, limits: Limits) -> Iterator[tuple[str, Fields]]:
    """Yields (name, fields) of every peer on the first set of the inputs."""
    for peer in PEERS:
        reason = unsupported(peer, inputs)
        if reason:
            yield peer.name, {"skipped": reason}
            continue
        try:
            row = _measure(peer, inputs, limits)
        except Exception as error:  # other people's code fails in any way, and we report which
            row = {"skipped": without_paths(f"{type(error).__name__}: {error}")}
        yield peer.name, row


def unsupported(peer: Peer, inputs: Inputs) -> str:
    """Returns why a peer cannot do what the inputs ask, "" if it might."""
    facts = inputs.facts
    package = peer.module.partition(".")[0]
    missing = [name for name in ("torch", package) if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if facts.is_per_token and not peer.takes_per_token:
        return "it takes constant decays only"
    if facts.for_training and not peer.has_backward:
        return "it has no backward pass"
    if peer.needs_gpu and facts.platform != "gpu":
        return f"it needs a GPU, this is {facts.platform}"
    if peer.max_seq is not None and facts.seq > peer.max_seq:
        return f"the suite runs it up to {peer.max_seq} tokens"
    return ""


def own_log_decay(peer: Peer, n_heads: int) -> tuple[float, ...] | None:
    """Returns the log decay of each head that the peer chooses itself; None = the inputs'."""
    if peer.function == "chunk_lightning_attn":  # layer 0 of 1
        return tuple(-8 / n_heads * head for head in range(n_heads))
    return None  # chunk_retention's are RetNet's, as the inputs'


def load(peer: Peer) -> Callable[..., Any]:
    """Returns the peer's function; raises whatever its import raises.

    Two of LeetDecoding's pure PyTorch files import a CUDA extension that compiles itself on import,
    and use it only without decay. Where it does not build an empty module stands for it meanwhile.
    """
    needs_product = peer.module in (f"{LEET}.BlockBased", f"{LEET}.Recursion")
    if needs_product and peer.module not in sys.modules:
        stand_in = types.ModuleType(CUDA_PRODUCT)
        stand_in.__dict__["causal_dot_product"] = None
        try:
            if not importlib.import_module("torch").cuda.is_available():
                raise ImportError("no GPU")
            importlib.import_module(CUDA_PRODUCT)
        except Exception:  # no compiler, driver or GPU: many types
            sys.modules[CUDA_PRODUCT] = stand_in
        importlib.import_module(peer.module)
        if sys.modules[CUDA_PRODUCT] is stand_in:
            del sys.modules[CUDA_PRODUCT]
    return getattr(importlib.import_module(peer.module), peer.function)


def make_call(peer: Peer, inputs: Inputs) -> Callable[[], tuple[Any, ...]]:
    """Returns what to time: a call on torch copies of the first set, (out[, gradients])."""
    torch = importlib.import_module("torch")
    function = load(peer)
    facts = inputs.facts
    jax.block_until_ready(inputs.sets[0])
    query, key, value, log_decay, *cotangent = (torch.from_dlpack(x) for x in inputs.sets[0])

    def layout(x):
        return x.transpose(1, 2).contiguous() if peer.is_heads_first else x.clone()

    leaves = [layout(x) for x in (query, key, value)]
    options: dict[str, Any] = {}
    if not peer.is_heads_first:
        options["scale"] = facts.d_key**-0.5
    if peer.function == "chunk_lightning_attn":
        options |= {"layer_idx": 0, "num_layers": 1}
    if facts.is_per_token:
        leaves.append(log_decay.clone())
    elif peer.decay == "log":
        options["g_gamma"] = log_decay.clone()
    spelled = {"rate": -log_decay, "factor": log_decay.exp()} if log_decay.ndim == 1 else {}
    constants = [spelled[peer.decay]] if peer.decay in spelled else []

    def forward():
        out = function(*leaves, *constants, **options)
        return out[0] if isinstance(out, tuple) else out

    if not facts.for_training:

        def call():
            with torch.no_grad():
                return (forward(),)

        return call
    upstream = layout(cotangent[0])
    for leaf in leaves:
        leaf.requires_grad_()

    def call_both():
        out = forward()
        return (out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype)))

    return call_both


def results(peer: Peer, outputs: tuple[Any, ...], d_key: int) -> list[np.ndarray]:
    """Returns a call's outputs as `cut` arrays in our layout, with the scale that we have."""
    found = []
    for x in outputs:
        x = x.detach().float()
        if peer.is_heads_first:
            x = x.transpose(1, 2) * d_key**-0.5
        found.append(cut(x.cpu().numpy()))
    return found


def _measure(peer: Peer, inputs: Inputs, limits: Limits) -> Fields:
    torch = importlib.import_module("torch")
    on_gpu = inputs.facts.platform == "gpu"
    row: Fields = {"torch_version": torch.__version__}
    before = torch.cuda.memory_allocated() if on_gpu else 0
    call = make_call(peer, inputs)
    reference = inputs.reference(log_decay=own_log_decay(peer, inputs.facts.heads))
    row |= error_fields(results(peer, call(), inputs.facts.d_key), reference)
    if not on_gpu:
        return row | {"n_inner": 1, "peak_bytes": None} | _cpu_times(torch, call, limits)
    torch.cuda.reset_peak_memory_stats()
    row |= _gpu_times(torch, call, limits)
    peak = torch.cuda.max_memory_allocated() - before
    del call
    torch.cuda.empty_cache()
    return row | {"peak_bytes": peak, "peak_bytes_kind": "torch: most allocated"}


def n_cores() -> int:
    """Returns how many cores this process may run on: jax starts a thread for each."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_times(torch: Any, call: Callable[[], Any], limits: Limits) -> Fields:
    """Returns the times with as many threads as jax has, or with one if that is faster.

    On a machine that others share, threads that wait for each other can be slower than one alone.
    """
    rows = []
    for n_threads in sorted({n_cores(), 1}, reverse=True):
        torch.set_num_threads(n_threads)
        seconds: list[float] = []
        for i in range(-limits.n_warmup, limits.n_runs):
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if i >= 0:
                seconds.append(elapsed)
            if sum(seconds) > CPU_SECONDS / 2 and len(seconds) >= timing.MIN_RUNS:
                break
        rows.append({"n_threads": n_threads, **timing.summary(seconds)})
    torch.set_num_threads(n_cores())
    best, *others = sorted(rows, key=lambda row: row["median_ms"])
    slower = {f"median_ms_{row['n_threads']}_threads": row["median_ms"] for row in others}
    return best | slower | {"n_warmup": limits.n_warmup}


def _gpu_times(torch: Any, call: Callable[[], Any], limits: Limits) -> Fields:
    """Returns the times of calls inside a CUDA graph, or of single calls where that fails."""

    def seconds(run: Callable[[], Any], n_calls: int) -> list[float]:
        found = []
        for i in range(-limits.n_warmup, limits.n_runs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            if i >= 0:
                found.append(1e-3 * start.elapsed_time(end) / n_calls)
        return found

    eager = seconds(call, 1)
    eager_ms = 1e3 * statistics.median(eager)
    row: Fields = {"n_warmup": limits.n_warmup, "eager_ms": round(eager_ms, 4)}
    if eager_ms >= GRAPH_BELOW_MS:
        return row | timing.summary(eager) | {"n_inner": 1, "timed": "CUDA events, one call"}
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                call()
        times = seconds(graph.replay, GRAPH_CALLS)
        del graph
    except RuntimeError as error:
        note = without_paths(f"CUDA events, one call; no CUDA graph: {error}")
        torch.cuda.synchronize()
        return row | timing.summary(eager) | {"n_inner": 1, "timed": note}
    return row | timing.summary(times) | {"n_inner": GRAPH_CALLS, "timed": "CUDA graph"}
