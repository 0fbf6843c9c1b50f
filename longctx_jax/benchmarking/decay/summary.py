"""What the rows of the suite `decay` say together: crossover, ratios, the recorded table.

Pure functions of flat rows, except `record`, which writes the table that "auto" reads.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longctx_jax.benchmarking.ratios import SPEED, speed_ratio_of_rows, text
from longctx_jax.benchmarking.rows import Fields, Row, groups, make
from longctx_jax.ops.decay import select, table
from longctx_jax.ops.decay.facts import Facts

SHAPE = ("batch_size", "n_heads", "seq_len", "d_key", "d_value", "dtype", "is_per_token")
WIDTHS = tuple(name for name in SHAPE if name != "seq_len")
TOLERANCE = 1.1  # "auto" may take this times as long as the best recorded form

Rows = Sequence[Mapping[str, Any]]
_MS = {"forward": "forward_ms", "forward_backward": "training_ms"}


def is_form(row: Mapping[str, Any]) -> bool:
    """Whether a row is a time of one of our forms of decay attention."""
    names = {i.name for i in select.IMPLEMENTATIONS}
    return row["name"] in names and row.get("part") != "peers" and "median_ms" in row


def crossover_rows(rows: Rows) -> Iterator[Row]:
    """Yields, for each shape but its length and each pass, where decay attention gets faster.

    seq_len is the first measured length at which the fastest form of decay attention beats the
    fastest of exact attention; None if there is none among those with both.
    """
    for key, group in groups(rows, (*WIDTHS, "pass")).items():
        decay = _best_by_length(row for row in group if is_form(row))
        softmax = _best_by_length(
            row for row in group if row["name"].startswith("softmax ") and "median_ms" in row
        )
        lengths = sorted(decay.keys() & softmax.keys())
        if not lengths:
            continue
        faster = [n for n in lengths if decay[n]["median_ms"] < softmax[n]["median_ms"]]
        about = {"part": "summary", "name": "crossover"}
        about |= dict(zip((*WIDTHS, "pass"), key, strict=True))
        longest = lengths[-1]
        shown = faster[0] if faster else longest
        found = {
            "lengths": lengths,
            "seq_len": faster[0] if faster else None,
            "form": decay[shown]["name"],
            "softmax_form": softmax[shown]["name"],
            "speed_up_at_longest": speed_ratio_of_rows(decay[longest], softmax[longest])[SPEED],
        }
        yield make(about, found)


def summary_text(row: Mapping[str, Any]) -> str:
    """Returns a ratio or crossover row as one line, "" for any other."""
    if SPEED in row:
        shape = "batch {batch_size}, {n_heads} heads of {d_key}, {seq_len} tokens, {dtype}"
        about = f"{row['name']}, {row['pass']}, {shape.format(**row)}"
        return f"{about}: {text(row)} times as fast"
    return crossover_text(row) if row["name"] == "crossover" else ""


def crossover_text(row: Mapping[str, Any]) -> str:
    """Returns a crossover row as one line."""
    shape = "batch {batch_size}, {n_heads} heads of {d_key}, {dtype}, {pass}".format(**row)
    if row["seq_len"] is None:
        where = f"no decay form beats {row['softmax_form']} up to {row['lengths'][-1]} tokens"
    else:
        where = f"{row['form']} beats {row['softmax_form']} from {row['seq_len']} tokens"
    return f"{shape}: {where}; {row['speed_up_at_longest']:.3g} times at {row['lengths'][-1]}"


def ratio_rows(rows: Rows) -> Iterator[Row]:
    """Yields speed ratios, peer's time over ours: of the fastest form, and of what "auto" takes."""
    for group in groups(rows, (*SHAPE, "pass")).values():
        ours = {row["name"]: row for row in group if is_form(row)}
        if not ours:
            continue
        best = min(ours.values(), key=lambda row: row["median_ms"])
        kinds = {"best": best}
        for row in ours.values():
            if row.get("is_auto"):
                kinds["auto"] = row
        for peer in group:
            if peer.get("part") != "peers" or "median_ms" not in peer:
                continue
            for kind, row in kinds.items():
                about = {"part": "peers", "pass": row["pass"], **{n: row[n] for n in SHAPE}}
                about["name"] = f"ratio {kind} / {peer['name']}"
                found: Fields = {"form": row["name"], **speed_ratio_of_rows(row, peer)}
                if peer.get("max_error") is None:
                    found["peer_is_not_finite"] = True
                yield make(about, found)


def table_rows(rows: Rows) -> list[dict[str, Any]]:
    """Returns the rows of `ops.decay.table` that the rows of a device give, by shape."""
    found = []
    for key, group in groups([row for row in rows if is_form(row)], SHAPE).items():
        batch, heads, seq, d_key, d_value, dtype, is_per_token = key
        shape = {"dtype": dtype, "batch": batch, "seq": seq, "heads": heads}
        shape |= {"d_key": d_key, "d_value": d_value, "is_per_token": is_per_token}
        times: dict[str, dict[str, float]] = {field: {} for field in _MS.values()}
        for row in group:
            times[_MS[row["pass"]]][row["name"]] = row["median_ms"]
        found.append(shape | times)
    return found


def record(rows: Rows, about: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Writes the table of the rows' device, and returns its path and what "auto" gets wrong by it.

    Args:
        rows: of one device, the newest of each case.
        about: versions, date and command; platform and device say whose table it is.

    Raises:
        ValueError: if no row is a time of a form.
    """
    recorded = table_rows(rows)
    if not recorded:
        raise ValueError("a table needs times of decay attention: got none; measure a part first")
    fields = ("date", "revision", "command", "jax_version", "jaxlib_version")
    path = table.write_table(about["device"], recorded, {k: about[k] for k in fields})
    return path, wrong_choices(recorded, about["platform"], about["device"])


def wrong_choices(recorded: Sequence[Mapping[str, Any]], platform: str, device: str) -> list[str]:
    """Returns a line for every recorded shape where "auto" takes more than 1.1 times the best."""
    lines = []
    for row in recorded:
        for field, for_training in (("forward_ms", False), ("training_ms", True)):
            names = ("dtype", "batch", "seq", "heads", "d_key", "d_value", "is_per_token")
            shape = {name: row[name] for name in names}
            if not row[field]:
                continue
            facts = Facts(platform, device, **shape, for_training=for_training)
            chosen = select.explain_facts(facts).chosen
            best = min(row[field], key=lambda name, times=row[field]: times[name])
            taken = row[field].get(chosen, math.inf)
            if taken > TOLERANCE * row[field][best]:
                lines.append(
                    f"{field} at {shape}: auto takes {chosen} ({taken:.4g} ms), "
                    f"{best} took {row[field][best]:.4g} ms"
                )
    return lines


def _best_by_length(rows) -> dict[int, Mapping[str, Any]]:
    best: dict[int, Mapping[str, Any]] = {}
    for row in rows:
        old = best.get(row["seq_len"])
        if old is None or row["median_ms"] < old["median_ms"]:
            best[row["seq_len"]] = row
    return best
