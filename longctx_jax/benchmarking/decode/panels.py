"""Panels of the suite `decode`: time a token, prefill and state by context; stacks as bars."""

from longctx_jax.figures.panels import Bars, Group, Lines
from longctx_jax.figures.style import Flat, Rows


def panels(rows: Rows) -> list[Group]:
    """Returns a group a part, and a shape or implementation."""
    rows = [row for row in rows if "median_ms" in row]
    parts = {name: [row for row in rows if row["part"] == name] for name in _names(rows, "part")}
    found = [_by_context(parts.get("mixers", []), "one token after a context, by mixer")]
    initial = parts.get("initial", [])
    for shape in _names(initial, "shape"):
        own = [row for row in initial if row["shape"] == shape]
        found.append(_by_context(own, f"attention to embeddings beside keys and values, {shape}"))
    attention = parts.get("attention", [])
    lines = []
    for name in _names(attention, "implementation"):
        own = [row for row in attention if row["implementation"] == name]
        lines.append(Lines(f"time a layer, {name}", own, "context_len", "median_ms", _label))
    found.append(Group(lines, "one query against a cache"))
    return [*found, *_stacks(parts.get("stacks", []))]


def _by_context(rows: Rows, title: str) -> Group:
    loop, prefill = ([row for row in rows if row["pass"] == kind] for kind in ("loop", "prefill"))
    drawn = (
        ("a token", loop, "token_ms"),
        ("prefill of the whole context", prefill, "median_ms"),
        ("memory of the state", loop, "cache_bytes"),
    )
    return Group([Lines(name, own, "context_len", y, _label) for name, own, y in drawn], title)


def _stacks(rows: Rows) -> list[Group]:
    groups = []
    for shape in _names(rows, "shape"):
        bars = []
        fields = ("batch_size", "context_len")
        here = [row for row in rows if row["shape"] == shape]
        for case in sorted({tuple(row[name] for name in fields) for row in here}):
            own = [row for row in here if tuple(row[name] for name in fields) == case]
            title = f"{_rows(case[0])}, {case[1]:,} tokens before"
            bars.append(Bars(title, own, lambda row: row["variant"], "token_ms", "ms a token"))
        groups.append(Group(bars, f"one token of staggered stacks, {shape}"))
    return groups


def _names(rows: Rows, field: str) -> list[str]:
    return list(dict.fromkeys(row[field] for row in rows))


def _label(row: Flat) -> str:
    name = row["pattern"][0]
    return name if row["part"] == "initial" else f"{name}, {_rows(row['batch_size'])}"


def _rows(n: int) -> str:
    return f"{n} rows" if n > 1 else "1 row"
