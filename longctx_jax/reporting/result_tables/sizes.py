"""Tables of memory accounting: caches, what fits, how the formulas compare with the compiler."""

from collections.abc import Mapping, Sequence
from typing import Any

from longctx_jax.benchmarking.rows import Flat
from longctx_jax.reporting.result_tables.source import NO_ROWS, Source, markdown
from longctx_jax.units import bytes_text

FILE = "accounting"
ANY = 2_147_483_647  # positions count no further
AT_1B: Mapping[str, Any] = {"weight_dtype": "bfloat16", "dtype": "bfloat16"}
CONTEXTS = (4096, 32_768, 131_072, 1_048_576)
EQUAL_CONTEXTS = (4096, 32_768, 131_072)
# scheme -> what it is, and the closed form without bookkeeping at 4,096 / 131,072 tokens
SCHEMES = {
    "mha": ("dense MHA", "512 MiB / 16 GiB"),
    "gqa": ("8 key heads", "128 MiB / 4 GiB"),
    "mqa": ("one key head", "16 MiB / 512 MiB"),
    "sliding": ("MHA, window of 4,096", "512 MiB"),
    "sliding_gqa": ("the same, 8 key heads", "128 MiB"),
    "vq": ("Transformer-VQ, 512 codes, window 512", "161 MiB"),
    "vq_gated": ("the same, 32 gated units of 128 and 4,096", "196 MiB"),
    "armt": ("segments of 512, 16 memory tokens", "114 MiB"),
    "layerwise": ("memory tokens a layer", ""),
    "rmt": ("memory tokens of the model", ""),
    "decay": ("a matrix a head", "8 MiB"),
    "decay_wide": ("values of 128", "16 MiB"),
    "decay_sliding": ("three decay layers, one with a window", ""),
    "rwkv4": ("RWKV-4", ""),
    "rwkv6": ("RWKV-6", ""),
    "mamba1": ("Mamba-1, 16 numbers a channel", ""),
    "mamba2": ("Mamba-2, 128 numbers a head", ""),
    "stagformer": ("two stacks, keys and values", "768 MiB / 24 GiB"),
    "stagformer_memory": ("the same, rows kept once", ""),
    "stagformer_window": ("the same, window of 512", ""),
    "inattention": ("embeddings, once", "16 MiB / 512 MiB"),
    "inattention_narrow": ("rows of 512 numbers", "4 MiB / 128 MiB"),
    "inattention_ids": ("token ids, 2 bytes each", "16 KiB / 512 KiB"),
    "inattention_counts": ("how often each id occurred, 128 ids", ""),
}
UPDATES = (
    *("quickstart", "decay_quality", "vq_quality", "stagformer_quality"),
    *("armt_small", "mamba_small"),
)


def _cache(source: Source, name: str, context_len: int) -> Flat | None:
    where = {"part": "programs", "program": "prefill", "name": name, **AT_1B}
    return source.one(FILE, context_len=context_len, **where)


def cache_of(source: Source, name: str) -> str:
    """The cache of a scheme after 131,072 tokens."""
    row = _cache(source, name, 131_072)
    return bytes_text(row["cache_bytes"]) if row else NO_ROWS


def about_caches(source: Source) -> str:
    """What to say of the rows of all caches after 131,072 tokens."""
    source.rows(FILE, part="programs", program="prefill", context_len=131_072, **AT_1B)
    return source.note()


def caches(source: Source) -> str:
    """Parameters, and caches by context, of every scheme at 1 B."""
    lines = []
    for name, (about, textbook) in SCHEMES.items():
        rows = [_cache(source, name, n) for n in CONTEXTS]
        size = _billions(rows[0]["n_parameters"]) if rows[0] else ""
        sizes = [bytes_text(row["cache_bytes"]) if row else "" for row in rows]
        lines.append([f"`{name}`", about, size, *sizes, textbook])
    heads = ["scheme", "", "parameters", *(f"{n:,}" for n in CONTEXTS), "textbook"]
    return markdown(heads, lines)


def contexts(source: Source) -> str:
    """The longest contexts in 24 GiB; schemes that have no limit are left out."""
    lines = []
    for name in SCHEMES:
        row = source.one(FILE, part="contexts", name=name, budget_bytes=24 * 2**30, **AT_1B)
        if row and row["largest_context_state"] < ANY:
            found = row["largest_context_state"], row["largest_context_peak"]
            lines.append([f"`{name}`", *(f"{n:,}" for n in found)])
    return markdown(["scheme", "state", "generation"], lines)


def models(source: Source) -> str:
    """The largest models in the memory of dense MHA."""
    lines, budgets = [], {}
    for name in SCHEMES:
        line = [f"`{name}`"]
        for length in EQUAL_CONTEXTS:
            row = source.one(
                FILE, part="models", name=name, context_len=length, baseline="mha", **AT_1B
            )
            line.append(_fits(row) if row else "")
            budgets[length] = bytes_text(row["budget_bytes"]) if row else ""
        lines.append(line)
    heads = [f"{length:,}: {budget}" for length, budget in budgets.items()]
    return markdown(["scheme", *heads], lines)


def _fits(row: Flat) -> str:
    deep, wide = row["deep"], row["wide"]
    layers = f"{deep['n_layers']} layers {deep['n_parameters'] / 1e9:.2f}"
    return f"{layers}, or width {wide['d_model']:,} {wide['n_parameters'] / 1e9:.2f}"


def accuracy(source: Source) -> str:
    """Formula over compiled plan, float32, 1 B: peak and temporaries."""
    programs = ("prefill", "step", "loop")
    lines = []
    for name in SCHEMES:
        line = [f"`{name}`"]
        for program in programs:
            where = {"part": "programs", "program": program, "dtype": "float32"}
            rows = [r for r in source.rows(FILE, name=name, **where) if "compiled" in r]
            line.append(f"{_range(rows, 'peak_ratio')} / {_range(rows, 'temporaries_ratio')}")
        lines.append(line)
    return markdown(["peak / temporaries", *programs], lines)


def _range(rows: Sequence[Flat], field: str) -> str:
    found = sorted({f"{row[field]:.2f}" for row in rows})
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}" if found else ""


def updates(source: Source) -> str:
    """Updates of six configs: planned peak, and formula over plan."""
    lines = []
    for name in UPDATES:
        row = source.one(FILE, part="programs", program="train", name=name)
        if row is None:
            continue
        shape = f"{row['batch_size']} x {row['seq_len']}"
        plan = f"{row['compiled']['peak'] / 2**20:,.0f} MiB"
        ratios = f"{row['peak_ratio']:.2f}", f"{row['temporaries_ratio']:.2f}"
        lines.append([f"`{name}`", shape, row["remat"], plan, *ratios])
    heads = ["config", "rows x tokens", "remat", "plan", "ratio of peaks", "of temporaries"]
    return markdown(heads, lines)


def _billions(n: int) -> str:
    return f"{n / 1e9:.2f} B"
