"""JSON objects in files that somebody else may have written: checked, and limited in size.

Standard library only, so that every layer may use it. JSON runs no code; what is left to go wrong
(other encodings, nesting without end, numbers of a million digits, files of any size, or a device
or a pipe in place of a file) ends in one `ValueError` that names the file and what to do.
"""

import json
import os
import pathlib
from typing import Any

MAX_BYTES = 16_000_000  # of a file; parsed JSON takes up to 30 times as much memory
MAX_DEPTH = 100  # of nested objects and lists


def parse_object(raw: bytes | str, name: str, *, remedy: str) -> dict[str, Any]:
    """Returns the JSON object that `raw` (UTF-8) holds.

    Args:
        raw: the text; its size is the caller's business.
        name: what it is, for the message: most often a path.
        remedy: what to do about it, for the message.

    Raises:
        ValueError: if it is anything else.
    """
    try:
        value = json.loads(raw if isinstance(raw, str) else raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be JSON: it cannot be read ({error}); {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{name} must hold a JSON object: it holds a {type(value).__name__}; {remedy}"
        )
    if _is_deep(value):
        raise ValueError(
            f"{name} must be JSON of at most {MAX_DEPTH} levels: it is nested deeper; {remedy}"
        )
    return value


def _is_deep(value: Any) -> bool:
    """Whether containers are nested more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def read_object(
    path: str | os.PathLike[str], *, remedy: str, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
        path: of the file.
        remedy: what to do if it is none, for the message.
        max_bytes: larger files are not read.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file, too large or no JSON object.
    """
    return parse_object(read_limited(path, max_bytes, remedy=remedy), str(path), remedy=remedy)


def read_limited(path: str | os.PathLike[str], max_bytes: int, *, remedy: str) -> bytes:
    """Returns the bytes of a file of at most `max_bytes`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no ordinary file (a pipe would be waited for), or larger.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a file: it is a folder or a device; {remedy}")
    with path.open("rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ValueError(
            f"{path} must be at most {max_bytes} bytes: it has {path.stat().st_size}; {remedy}"
        )
    return raw
