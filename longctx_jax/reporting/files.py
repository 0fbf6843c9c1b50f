"""Reading files of run folders that may be torn, huge, or written by anybody.

A reader never raises about content. It returns what could be used, and notes (plain sentences for
the page) about what could not. Sizes are bounded by the constants below; docs/report.md lists them.
"""

import json
import math
import pathlib
from collections.abc import Iterator
from typing import Any

MAX_JSON_BYTES = 4 * 2**20  # of a file that is one JSON object
MAX_LINES_BYTES = 64 * 2**20  # of a file of JSON lines; the rest is not read
MAX_LINE_BYTES = 2**20
MAX_NESTING = 20  # levels of objects and lists in one JSON value
MAX_NUMBER = 1e30  # larger ones are no measurements, and no axis can show them

Notes = list[str]


def read_object(path: pathlib.Path, max_bytes: int = MAX_JSON_BYTES) -> tuple[dict, Notes]:
    """The JSON object in the file; empty, with a note, where there is none."""
    if not path.is_file():  # a pipe or a device would be read for ever
        return {}, [f"{path.name} is missing"]
    try:
        if path.stat().st_size > max_bytes:
            return {}, [f"{path.name} is larger than {max_bytes >> 20} MiB and was not read"]
        content = _parse(path.read_bytes())
    except OSError as error:
        return {}, [f"{path.name} cannot be read: {error.strerror}"]
    if not isinstance(content, dict):
        return {}, [f"{path.name} holds no whole JSON object"]
    return content, []


def read_lines(path: pathlib.Path, max_bytes: int = MAX_LINES_BYTES) -> tuple[list[dict], Notes]:
    """The JSON objects of a file with one a line, in order, and what was skipped."""
    if not path.is_file():
        return [], [f"{path.name} is missing"]
    try:
        size = path.stat().st_size
        parsed = [_parse(line) for line in _lines(path, max_bytes) if line.strip()]
    except OSError as error:
        return [], [f"{path.name} cannot be read: {error.strerror}"]
    objects = [content for content in parsed if isinstance(content, dict)]
    notes = []
    if size > max_bytes:
        notes.append(f"only the first {max_bytes >> 20} MiB of {path.name} were read")
    if len(objects) < len(parsed):
        n_skipped = len(parsed) - len(objects)
        notes.append(f"{path.name}: {n_skipped} of {len(parsed)} lines hold no JSON object")
    return objects, notes


def read_tail(path: pathlib.Path, max_bytes: int) -> str:
    """The end of a text file, from the beginning of a line; "" if there is none to read."""
    try:
        if not path.is_file():
            return ""
        with path.open("rb") as file:
            start = max(0, path.stat().st_size - max_bytes)
            file.seek(start)
            text = file.read(max_bytes).decode(errors="replace")
    except OSError:
        return ""
    return text.partition("\n")[2] if start else text


def number(value: Any) -> float:
    """The value as a float; nan if it is no number that could be a measurement."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if abs(value) <= MAX_NUMBER else math.nan  # exact for ints of any size


def step_of(record: dict) -> int | None:
    """The record's step; None where it is no whole number of updates."""
    step = record.get("step")
    return step if isinstance(step, int) and number(step) >= 0 else None


def _lines(path: pathlib.Path, max_bytes: int) -> Iterator[bytes]:
    """Lines within the first `max_bytes`; of a longer line, pieces, which do not parse."""
    with path.open("rb") as file:
        while line := file.readline(min(MAX_LINE_BYTES, max_bytes - file.tell())):
            yield line


def _parse(content: bytes) -> Any:
    """The JSON object or list; None where there is none, or too deep a one."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # torn, not UTF-8, numbers of many digits, nested deeply
        return None
    is_container = isinstance(value, dict | list)
    return value if is_container and _is_nested_at_most(value, MAX_NESTING) else None


def _is_nested_at_most(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value
    inner = (child for child in children if isinstance(child, dict | list))
    return levels > 0 and all(_is_nested_at_most(child, levels - 1) for child in inner)
