"""Tables of what runs did: the quickstart, recall by distance, faults."""

from longctx_jax.benchmarking.rows import is_dirty, recorded
from longctx_jax.reporting.result_tables.source import NO_ROWS, Source, markdown

SEGMENTS = (2, 5, 10, 20, 50, 100, 200)
RECALL = {
    "passkey_2": "trained on 2",
    "passkey_5": "then 250 updates on 5, `memory.eps=0.1`",
}
# which rows -> label
MEMBERS = (
    ({"run": "armt_delta"}, "ARMT, sums and normalised features"),
    ({"run": "armt_normalized"}, "ARMT, weighted means of normalised features, `eps=0.05`"),
    ({"model": "mamba"}, "Mamba-2"),
    ({"model": "rmt"}, "RMT"),
    ({"model": "softmax"}, "full attention"),
    ({"model": "rwkv"}, "RWKV-6"),
    ({"model": "layerwise"}, "layer-wise tokens"),
    ({"model": "decay"}, "decay (retention)"),
    ({"model": "sliding"}, "sliding window of a segment"),
)


def quickstart(source: Source) -> str:
    """The sentence of README about `make train`."""
    row = source.one("quickstart_cpu", config="quickstart")
    if row is None:
        return f"(Its numbers: {NO_ROWS}.)"
    return (
        f"Training takes {row['train_minutes']:.1f} minutes on {row['host_cpus']} CPU cores "
        f"({row['n_steps']:,} steps) and reaches **{row['test_bits_per_byte']:.2f} bits per byte** "
        f"on the first 400,000 bytes of the test files ({row['validation_bits_per_byte']:.2f} on "
        f"the first 100,000 of the validation files; Python {row['python_version']}, jax "
        f"{row['jax_version']}; the text, so the number, depends a little on the installed Python)."
    )


def recall(source: Source) -> str:
    """ARMT on rows of passkeys, by length."""
    rows = [({"run": run}, label) for run, label in RECALL.items()]
    return _by_length(source, "recall_cpu", rows)


def members(source: Source) -> str:
    """Members of equal size on the same rows."""
    return _by_length(source, "recall_members_cpu", MEMBERS)


def _by_length(source: Source, file: str, models) -> str:
    lines = []
    for where, label in models:
        cells = []
        for n in SEGMENTS:
            row = source.one(file, is_total=True, n_segments=n, **where)
            cells.append(f"{row['accuracy']:.3f}" if row else "")
        lines.append([label, *cells])
    return markdown(["segments before the question's", *map(str, SEGMENTS)], lines)


def faults(source: Source) -> str:
    """Every kind of fault, and what came of it."""
    lines = []
    for row in source.rows("faults_cpu"):
        name = f"{row['fault']}, {row['detail']}"
        if row["n_survived"] == row["n"] and row["note"]:  # others quote the run's message
            name += f" ({row['note'].partition(';')[0]})"
        counts = (row["n"], row["n_survived"], row["n_refused"], row["n_lost"])
        lines.append([name, *map(str, counts)])
    heads = ["fault", "injections", "survived", "refused", "checkpoints lost"]
    return markdown(heads, lines)


def uncommitted(source: Source) -> str:
    """Files with rows of an uncommitted tree, and how many of those that count."""
    lines = []
    for path in sorted(source.folder.glob("*.jsonl")):
        rows = recorded(path)
        if n := sum(map(is_dirty, rows)):
            lines.append([f"`{path.name}`", f"{n} of {len(rows)}"])
    return markdown(["file", "rows of an uncommitted tree"], lines) if lines else "None."
