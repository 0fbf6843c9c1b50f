"""Fills tables and values into pages, between their markers."""

import pathlib
import re
from collections.abc import Iterator, Mapping

from longctx_jax.reporting.result_tables import TABLES, VALUES, Table
from longctx_jax.reporting.result_tables.source import Source

MARKER = re.compile(r"<!-- (table|value): ([^>]*?) -->(.*?)<!-- /(table|value) -->", re.DOTALL)
OPENING = re.compile(r"<!-- (?:table|value): [^>]*? -->")


def pages(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the pages that may have tables."""
    yield root / "README.md"
    yield root / "results" / "README.md"
    yield from sorted((root / "docs").glob("*.md"))


def fill(
    text: str,
    folder: pathlib.Path,
    tables: Mapping[str, Table] = TABLES,
    values: Mapping[str, Table] = VALUES,
) -> str:
    """Returns the text with every table and value as the rows in a folder have it.

    Raises:
        ValueError: if a marker names nothing that is known, or is not closed by its like.
    """
    known = {"table": tables, "value": values}

    def made(match: re.Match[str]) -> str:
        kind, name, _, closed = match.groups()
        if closed != kind or OPENING.search(match.group(3)):
            raise ValueError(
                f"a marker must be closed: <!-- {kind}: {name} --> is not; write <!-- /{kind} --> "
                "behind what it holds"
            )
        if name not in known[kind]:
            raise ValueError(
                f"a {kind} must be one of {', '.join(known[kind])}: got {name!r}; correct the "
                "marker, or define it in longctx_jax/reporting/result_tables"
            )
        source = Source(folder)
        content = known[kind][name](source)
        if kind == "table":
            note = source.note()
            content = f"\n\n{content}\n\n" + (f"{note}\n\n" if note else "")
        return f"<!-- {kind}: {name} -->{content}<!-- /{kind} -->"

    filled = MARKER.sub(made, text)
    if len(OPENING.findall(text)) != len(MARKER.findall(text)):
        raise ValueError(
            "a marker must be closed: got more that open than that close; write <!-- /table --> or "
            "<!-- /value --> behind what each holds"
        )
    return filled


def named(text: str) -> list[tuple[str, str]]:
    """Returns (kind, name) of every marker of a text."""
    return [(match[1], match[2]) for match in MARKER.finditer(text)]
