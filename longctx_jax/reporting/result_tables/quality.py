"""Tables of bits per byte: by context, by scheme, by position in the context."""

from collections.abc import Mapping, Sequence
from typing import Any

from longctx_jax.reporting.result_tables.source import MISSING, NO_ROWS, Source, markdown, mean

Models = Mapping[str, Mapping[str, Any]]  # label -> which rows
TEXTS = ("enwik8_4m", "pg19_mini")

DECAY: Models = {
    "gated decay": {"pattern": ["decay"], "decay_kind": "gated"},
    "gated decay x 3, softmax": {"pattern": ["decay", "decay", "decay", "softmax"]},
    "decay (RetNet)": {"pattern": ["decay"], "decay_kind": "retnet"},
    "softmax, rotary": {"pattern": ["softmax"]},
}
_CARRIED: dict[str, Any] = {
    "pattern": ["vq"],
    "vq_use_table": True,
    "train_carries_cache": True,
    "train_cold_start_every": MISSING,
}
_CODES_256 = _CARRIED | {"vq_codebook_size": 256}
VQ: Models = {
    "vq, window of 128 only (no table), 256 codes": {"pattern": ["vq"], "vq_use_table": False},
    "vq, 256 codes, every training window starts cold": _CODES_256 | {"train_carries_cache": False},
    "vq, 256 codes, training sequences of 4 windows, as published": _CODES_256
    | {"train_cold_start_every": 4},
    "vq, 1,024 codes, cache carried from the first update on": _CARRIED
    | {"vq_codebook_size": 1024},
    "the same, 512 codes": _CARRIED | {"vq_codebook_size": 512},
    "the same, 256 codes": _CODES_256,
    "the same, 128 codes": _CARRIED | {"vq_codebook_size": 128},
    "softmax, rotary": {"pattern": ["softmax"]},
}


def _inattention(**variant: Any) -> dict[str, Any]:
    return {"model": "inattention", "variant": variant}


# label -> numbers of cache a token, which rows
INATTENTION: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "full attention, 4 heads": ("1,024", {"model": "transformer", "n_kv_heads": 4}),
    "full attention, one key head of 16: equal inference memory": (
        "128",
        {"model": "transformer", "n_kv_heads": 1},
    ),
    "InAttention, `near`, counts": (
        "0",
        _inattention(memory_position="none", score_position="near"),
    ),
    "`relative`, no sinusoids": ("128", _inattention(memory_position="none")),
    "`relative`, sinusoids": ("128", _inattention()),
    "`relative`, sinusoids, rows of 32": ("32", _inattention(d_memory=32)),
    "`decoupled`, sinusoids": ("144", _inattention(score_position="decoupled", d_rotary=16)),
    "`alibi`, counts": ("0", _inattention(memory_position="none", score_position="alibi")),
}


def _stagformer(**variant: Any) -> dict[str, Any]:
    return {"model": "stagformer", "variant": variant}


STAGFORMER: Models = {
    "dense, 12 layers": {"model": "transformer", "n_layers": 12},
    "dense, 6 layers": {"model": "transformer", "n_layers": 6},
    "separate": _stagformer(),
    "separate, window 128": _stagformer(cross_window=128),
    "separate, window 1": _stagformer(cross_window=1),
    "separate, 3 stacks": _stagformer(n_stacks=3),
    "separate, 4 stacks": _stagformer(n_stacks=4),
    "the control: nothing staggered": _stagformer(stagger=False),
    "shared": _stagformer(share_weights=True),
    "shared, window 128": _stagformer(share_weights=True, cross_window=128),
    "shared, added shift": _stagformer(share_weights=True, handoff="add"),
}
# run -> label, tokens trained on
LONGER = {
    "dense_512": ("before: full attention, trained at 512", "1.02 M"),
    "dense_tuned": ("trained on at 8,192", "+ 0.41 M"),
    "dense_linear": (
        'the same, positions divided by 16 (`rope_scaling="linear"`)',
        "+ 0.41 M",
    ),
    "inattention_tuned": (
        "converted to InAttention (rotary), trained on at 8,192, 1,024 losses a row",
        "+ 0.41 M",
    ),
    "dense_scratch": ("full attention from scratch at 8,192", "1.43 M"),
    "inattention_scratch": (
        "InAttention (`relative`) from scratch at 8,192, 1,024 losses a row",
        "1.43 M",
    ),
    "inattention_512": ("InAttention (`relative`), trained at 512 only", "1.02 M"),
}


def decay(source: Source) -> str:
    """Mixers by context length, on two texts."""
    lengths = (512, 2048, 8192, 32_768)
    return _by_context(source, "decay_quality_cpu", DECAY, lengths, "mixer")


def vq(source: Source) -> str:
    """Quantised keys by context length, on two texts."""
    return _by_context(source, "vq_quality_cpu", VQ, (512, 2048, 8192), "attention")


def _by_context(
    source: Source, file: str, models: Models, lengths: Sequence[int], head: str
) -> str:
    def cell(where: Mapping[str, Any], length: int) -> str:
        texts = (source.rows(file, data=t, context_len=length, **where) for t in TEXTS)
        return " / ".join(filter(None, (mean(rows, "bits_per_byte") for rows in texts)))

    lines = [[name, *(cell(where, n) for n in lengths)] for name, where in models.items()]
    return markdown([head, *(f"{n:,}" for n in lengths)], lines)


def inattention(source: Source) -> str:
    """Models on pg19_mini, means of seeds."""
    return _inattention_table(source, "pg19_mini", INATTENTION)


def inattention_enwik8(source: Source) -> str:
    """Three of them on enwik8_4m."""
    names = list(INATTENTION)
    return _inattention_table(
        source, "enwik8_4m", {name: INATTENTION[name] for name in (*names[:2], names[3])}
    )


def _inattention_table(source: Source, text: str, models: Mapping[str, tuple[str, Any]]) -> str:
    lines = []
    for name, (cache, where) in models.items():
        line = [name, cache]
        for length in (512, 2048, 8192):
            where = {**where, "data": text, "context_len": length}
            rows = source.rows("inattention_quality_cpu", **where)
            line.append(mean(rows, "bits_per_byte", each=length == 512))
        lines.append(line)
    return markdown(["model", "cache", "512", "2,048", "8,192"], lines)


def stagformer(source: Source) -> str:
    """Staggered stacks on enwik8_4m, means of two seeds."""
    lines = []
    for name, where in STAGFORMER.items():
        rows = (source.rows("stagformer_quality_cpu", context_len=n, **where) for n in (512, 2048))
        lines.append([name, *(mean(found, "bits_per_byte", each=True) for found in rows)])
    return markdown(["model", "test, 512", "test, 2,048"], lines)


def longer(source: Source) -> str:
    """Ways to contexts of 8,192: each seed's bits per byte."""
    lines = []
    for run, (name, tokens) in LONGER.items():
        line = [name, tokens]
        for length in (512, 2048, 8192):
            rows = source.rows("longer_context_cpu", run=run, context_len=length)
            rows.sort(key=lambda row: row["seed"])
            line.append(", ".join(f"{row['bits_per_byte']:.3f}" for row in rows))
        lines.append(line)
    return markdown(["model", "tokens trained on", "512", "2,048", "8,192"], lines)


def longer_positions(source: Source) -> str:
    """The same by position in stripes of 8,192; of two seeds the second."""
    lines: list[list[str]] = []
    heads: list[str] = []
    for run, (name, _) in LONGER.items():
        rows = source.rows("longer_context_cpu", run=run, context_len=8192)
        rows = [row for row in rows if "position_edges" in row]
        if not rows:
            continue
        row = max(rows, key=lambda row: row["seed"])
        bits = [f"{value:.2f}" for value in row["bits_per_byte_by_position"]]
        heads = [f"to {end - 1:,}" for end in row["position_edges"][1:]]
        lines.append([name, *bits])
    return markdown(["model", *heads], lines) if lines else NO_ROWS
