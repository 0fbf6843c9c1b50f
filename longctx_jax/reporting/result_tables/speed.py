"""Tables of times: updates, layers, decoded tokens, prefills."""

from longctx_jax.reporting.result_tables.source import (
    NO_ROWS,
    Source,
    decimal_bytes,
    markdown,
    ms,
    number,
    ratio,
)

HEADS = {"shga": "gated head", "mqa": "MQA", "mha": "MHA"}
TRAIN = {  # name of the row -> label
    "yardstick": "yardstick",
    "transformer": "`transformer`",
    "transformer, no documents": "`transformer`, no documents",
    "transformer, carried cache": "`transformer`, cache carried across windows",
    "decay": "`decay`",
    "decay, carried cache": "`decay`, cache carried",
    "pattern decay-sliding": '`("decay", "sliding")`',
}
VQ_OTHERS = {
    "published legacy scan": "published, scan over blocks (branch `main`)",
    "published legacy scan, no cache gradient": "the same without gradients through the cache",
    "published optimized scan": "published, scan (branch `optimized`)",
    "published optimized serial": "published, all blocks at once, serial",
    "published optimized matmul": "the same, matmul",
    "published optimized assoc_scan": "the same, associative scan",
    "quadratic": "our quadratic form",
    "softmax blockwise": "exact attention, blockwise",
}
OLDER_RINGS = ("gqa", "mqa", "sliding 4096")  # at 2**20: when every layer wrote its cache anew
OLDER_RINGS = ("gqa", "mqa", "sliding 4096")  # at 2**20: when every layer wrote its cache anew
INITIAL = {
    "mha": "MHA",
    "gqa": "GQA, one key head",
    "mqa": "MQA",
    "sliding 4096": "sliding window of 4,096",
    "keys and values": "`kv`",
    "embeddings": "`embedding`",
    "embeddings, narrow": "`embedding`, rows of 32 numbers",
    "ids, sinusoids": "`ids`, sinusoids (rows made anew)",
    "ids": "`ids`, `near`",
    "counts": "`counts`, `near`",
    "counts, alibi": "`counts`, `alibi`",
}


def train(source: Source) -> str:
    """Updates of models beside the yardstick's."""
    lines = []
    for name, label in TRAIN.items():
        row = source.one("train_cpu", part="models", name=name)
        than = source.one("train_cpu", part="models", name=f"ratio {name} / yardstick")
        times = number(row, "median_ms", ".0f"), number(row, "tokens_per_s", ",.0f")
        lines.append([label, *times, ratio(than)])
    heads = ["", "ms a step", "tokens/s", "tokens/s over the yardstick's"]
    return markdown(heads, lines)


def saves(source: Source) -> str:
    """What a checkpoint costs the quickstart."""
    row = source.one("train_cpu", part="saves")
    if row is None:
        return NO_ROWS
    return (
        f"{row['save_wait_ms']:.0f} ms a save, {row['save_extra_ms']:.0f} ms with what its threads "
        f"take from the updates: {100 * row['overhead_fraction']:.2f} % at its interval of "
        f"{row['checkpoint_every']} steps"
    )


def vq_layer(source: Source) -> str:
    """How many times as fast the linear form of a layer is, forward and backward."""
    lines = []
    for seq in (4096, 16_384):
        for other, label in VQ_OTHERS.items():
            where = {"part": "layer", "pass": "forward_backward", "other": other, "seq_len": seq}
            rows = [source.one("vq_cpu", form="linear", head_type=h, **where) for h in HEADS]
            if any(rows):
                lines.append([f"{seq:,}", label, *map(ratio, rows)])
    return markdown(["tokens", "`linear` relative to", *HEADS.values()], lines)


def vq_more(source: Source) -> str:
    """The rest of the suite in numbers: forward, growth, whole updates."""
    where = {"part": "layer", "pass": "forward", "head_type": "shga", "seq_len": 4096}
    scan = source.one("vq_cpu", form="linear", other="published legacy scan", **where)
    slope = source.one("vq_cpu", part="slope", name="slope linear", head_type="shga")
    growth = number(slope, "exponent", ".3f")
    lines = [
        ["forward alone, over the scan of branch `main`", ratio(scan), "", ""],
        ["growth from 4,096 to 65,536 tokens", growth and f"length^{growth}", "", ""],
    ]
    for other, label in (("quadratic", "quadratic form"), ("transformer", "softmax attention")):
        where = {"part": "model", "form": "linear", "other": other, "seq_len": 4096}
        rows = [source.one("vq_cpu", head_type=head, **where) for head in HEADS]
        lines.append([f"an update of a small model, over its {label}", *map(ratio, rows)])
    return markdown(["", *HEADS.values()], lines)


def vq_decode(source: Source) -> str:
    """A decoded token and the state, after contexts."""
    lengths = (1024, 8192, 65_536, 2**20)
    names = {"shga": "gated heads", "mqa": "MQA", "mha": "MHA"}
    names |= {"transformer mqa": "softmax, MQA", "transformer mha": "softmax, MHA"}
    lines = []
    for name, label in names.items():
        rows = [source.one("vq_cpu", part="decode", name=name, context_len=n) for n in lengths]
        cells = [
            f"{ms(row['token_ms'])} / {decimal_bytes(row['cache_bytes'])}"
            if row and "token_ms" in row
            else ""
            for row in rows
        ]
        lines.append([label, *cells])
    return markdown(["ms a token / state", *(f"{n:,} tokens" for n in lengths)], lines)


def decode_mixers(source: Source) -> str:
    """A decoded token and the cache, one row, by mixer."""
    lengths = (256, 1024, 4096)
    kinds = {
        "decay": "decay",
        "sliding": "sliding window of 128",
        "softmax": "softmax, KV cache",
    }
    lines = []
    for kind, label in kinds.items():
        where = {"part": "mixers", "name": f"loop {kind}", "batch_size": 1}
        rows = [source.one("decode_cpu", context_len=n, **where) for n in lengths]
        cells = [
            f"{row['token_ms']:.3f} / {decimal_bytes(row['cache_bytes'])}" if row else ""
            for row in rows
        ]
        lines.append([label, *cells])
    return markdown(["ms a token / cache", *(f"{n:,} tokens" for n in lengths)], lines)


def decode_initial(source: Source) -> str:
    """A decoded token by context, of attention to embeddings beside keys and values."""
    lengths = (1024, 8192, 65_536, 2**20)
    lines = []
    for name, label in INITIAL.items():
        where = {"part": "initial", "pass": "loop", "variant": name, "name": f"initial {name}"}
        rows = [source.one("decode_cpu", context_len=n, **where) for n in lengths]
        cells = [number(row, "token_ms", ms) or "not run" for row in rows]
        if name in OLDER_RINGS:
            cells[-1] = ""
        last = number(rows[-1], "cache_bytes", decimal_bytes)
        lines.append([label, *cells, last])
    heads = [f"{n:,}" for n in lengths]
    return markdown(["tokens before", *heads, f"cache at {lengths[-1]:,}"], lines)


def prefill_initial(source: Source) -> str:
    """The prefill of a prompt to its last logits."""
    lengths = (1024, 8192, 65_536)
    lines = []
    for name, label in INITIAL.items():
        where = {"part": "initial", "pass": "prefill", "name": f"initial {name}"}
        rows = [source.one("decode_cpu", context_len=n, **where) for n in lengths]
        than = source.one(
            "decode_cpu", name=f"ratio initial prefill {name} / mha", context_len=lengths[0]
        )
        lines.append([label, *(number(row, "median_ms", ms) for row in rows), ratio(than)])
    heads = [f"{n:,} tokens" for n in lengths]
    return markdown(["ms", *heads, "times as fast as MHA at 1,024"], lines)


def decode_stacks(source: Source) -> str:
    """A decoded token of staggered stacks, and of dense models."""
    places = ((256, 1), (2048, 1), (256, 8))
    lines = []
    names = [row["variant"] for row in source.rows("decode_cpu", part="stacks", context_len=256)]
    for name in dict.fromkeys(names):
        where = {"part": "stacks", "name": f"stacks {name}"}
        rows = [
            source.one("decode_cpu", context_len=n, batch_size=batch, **where)
            for n, batch in places
        ]
        cache = number(rows[1], "cache_bytes", decimal_bytes)
        where = {"part": "stacks", "context_len": 2048, "batch_size": 1}
        dense, loop = (
            ratio(source.one("decode_cpu", name=f"ratio stacks {name} / {baseline}", **where))
            for baseline in ("dense", "loop")
        )
        times = (number(row, "token_ms", ms) for row in rows)
        lines.append([name, *times, cache, dense, loop])
    heads = ["256 tokens before, 1 row", "2,048, 1 row", "256, 8 rows", "cache at 2,048"]
    return markdown(["ms", *heads, "tokens/s at 2,048 over dense", "over the loop"], lines)


def memory_prefill(source: Source) -> str:
    """A prefill of a stack with memory, in both orders, beside full attention."""
    lengths = (512, 1024, 2048, 4096, 8192, 16_384)
    lines = []
    for n in lengths:
        where = {"part": "lengths", "seq_len": n}
        diagonal = source.one("memory_cpu", name="armt diagonal", **where)
        cells = source.one("memory_cpu", name="armt sequential", **where)
        ratios = [
            ratio(source.one("memory_cpu", other=other, **where))
            for other in ("armt sequential", "full attention")
        ]
        started = (number(row, "launches", ",d") for row in (diagonal, cells))
        lines.append([f"{n:,}", number(diagonal, "median_ms", ms), *started, *ratios])
    heads = ["ms by diagonals", "kernels started", "cell by cell", "times as fast as cell by cell"]
    return markdown(["tokens", *heads, "as full attention"], lines)
