"""Rows: what was measured, of what, and where.

A row is `{"case": {...}, "measured": {...}, "environment": {...}}`, one JSON line of a file. The
case is what the row is about, and nothing else is: of rows of equal cases, on the same kind of
device, the newest counts. `case["suite"]` says who measured. Readers take rows flat.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from longctx_jax import json_files

Fields = dict[str, Any]
Row = dict[str, Fields]
Flat = Mapping[str, Any]  # a row's fields side by side

KINDS = ("case", "measured", "environment")
DIRTY = "-dirty"  # ends the revision of a checkout with uncommitted changes


def make(case: Fields, measured: Fields, environment: Fields | None = None) -> Row:
    """Returns the row.

    Raises:
        ValueError: if two of them share the name of a field.
    """
    row = {"case": dict(case), "measured": dict(measured), "environment": environment or {}}
    _check(row, "a row")
    return row


def within(rows: Iterable[Row], **case: Any) -> Iterator[Row]:
    """Yields the rows with more fields in front of their cases; a row's own count."""
    for row in rows:
        yield {**row, "case": case | row["case"]}


def append(path: str | os.PathLike[str], rows: Sequence[Row]) -> None:
    """Appends rows as JSON lines in one write, making the folder if need be.

    Readers and other writers see whole rows only; an interrupted benchmark keeps the rows before.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def read(path: str | os.PathLike[str]) -> list[Row]:
    """Returns the rows of a file in the order they were written.

    Raises:
        ValueError: if a line is no row; names it.
    """
    found = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                row = json_files.parse_object(line, where, remedy="remove the line")
                _check(row, where)
                found.append(row)
    return found


def _check(row: Mapping[str, Any], where: str) -> None:
    parts = [part for kind in KINDS if isinstance(part := row.get(kind), dict)]
    if set(row) != set(KINDS) or len(parts) < len(KINDS):
        raise ValueError(
            f"{where}: must be an object of the objects {', '.join(KINDS)}: got "
            f"{', '.join(sorted(row)) or 'no fields'}; remove the line, and measure it again"
        )
    names = [name for part in parts for name in part]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"{where}: a field belongs to one of {', '.join(KINDS)}: got {', '.join(twice)} in "
            "two of them; rename one"
        )


def identity(row: Row) -> str:
    """Returns what two rows must share to be about the same thing: the case, and the device."""
    about = [row["case"], row["environment"].get("device")]
    return json.dumps(about, sort_keys=True)


def newest(rows: Iterable[Row]) -> list[Row]:
    """Returns the last row of each case and device, in order of first appearance."""
    return list({identity(row): row for row in rows}.values())


def flat(row: Row) -> Fields:
    """Returns the fields of a row side by side."""
    return row["environment"] | row["case"] | row["measured"]


def recorded(path: str | os.PathLike[str]) -> list[Fields]:
    """Returns the newest rows of a file, flat."""
    return [flat(row) for row in newest(read(path))]


def is_dirty(row: Flat) -> bool:
    """Whether a flat row was recorded on an uncommitted tree."""
    return str(row.get("revision", "")).endswith(DIRTY)


def groups(rows: Iterable[Flat], names: Sequence[str]) -> dict[tuple, list[Flat]]:
    """Returns the flat rows that have all the names, by their values."""
    found: dict[tuple, list[Flat]] = {}
    for row in rows:
        if all(name in row for name in names):
            found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found
