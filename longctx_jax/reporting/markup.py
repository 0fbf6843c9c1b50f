"""HTML elements and tables. Text is escaped unless it is `Html`, which only this package makes."""

import html
import math
import re
from collections.abc import Sequence
from typing import Any

from longctx_jax.reporting import charts
from longctx_jax.reporting.tables import RunCell, Table, is_empty

MAX_ROWS = 1_000  # of a table
_VOID = ("input",)  # elements without an end


class Html(str):
    """Markup, as opposed to text, which may say anything."""


def element(name: str, *children: str, **attributes: str) -> Html:
    """An element; children that are not `Html`, and all attributes, are escaped.

    Attribute names are Python's: `class_` is class, `data_key` is data-key.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{given}>")
    return Html(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str, separator: str = "") -> Html:
    """The children one after another, texts escaped."""
    return Html(separator.join(c if isinstance(c, Html) else html.escape(c) for c in children))


def swatch(index: int) -> Html:
    """A short piece of the line that stands for run `index` in charts."""
    line = element(
        "line",
        **{"x1": "1", "x2": "21", "y1": "5", "y2": "5", "stroke": charts.color(index)},
        stroke_width="3",
        stroke_dasharray=charts.dashes(index),
    )
    return element("svg", line, class_="swatch", viewBox="0 0 22 10", aria_hidden="true")


def breakable(text: str) -> Html:
    """The text, with places to break a line after commas, slashes and dots."""
    return join(*re.split(r"(?<=[,.=])|(?<=/)(?=..)", text), separator="<wbr>")


def run_link(index: int, name: str = "") -> Html:
    """The run's line, number and name, leading to its details."""
    number = element("b", str(index + 1))
    return element("a", swatch(index), number, " ", breakable(name), href=f"#details-{index}")


def table(content: Table, names: Sequence[str]) -> Html:
    """The table, scrollable sideways, sortable where scripts run; "" without rows.

    Args:
        content: columns and cells.
        names: of all runs, for cells that stand for one.
    """
    if not content.rows:
        return Html("")
    heads = [_cell("th", column, names, scope="col") for column in content.columns]
    lines = [
        element("tr", *(_cell("td", cell, names) for cell in row))
        for row in content.rows[:MAX_ROWS]
    ]
    body = element("table", element("thead", element("tr", *heads)), element("tbody", *lines))
    left_out = len(content.rows) - MAX_ROWS
    note = f"The first {MAX_ROWS} rows; {left_out} more are left out." if left_out > 0 else ""
    return join(element("div", body, class_="scroll"), element("p", note) if note else Html(""))


def number_text(value: float) -> str:
    """A number for people: whole ones with separators, others with four significant digits."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 else f"{value:#.4g}"


def _cell(kind: str, cell: Any, names: Sequence[str], **attributes: str) -> Html:
    if is_empty(cell):
        return element(kind, "–", class_="none", **attributes)
    if isinstance(cell, RunCell):
        name = names[cell.index] if kind == "td" else ""  # a head has no room for names
        return element(kind, run_link(cell.index, name), data_key=str(cell.index), **attributes)
    if isinstance(cell, int | float):
        return element(kind, number_text(cell), class_="number", data_key=repr(cell), **attributes)
    if kind == "td" and cell in ("finished", "running", "unfinished", "failed", "not started"):
        return element(kind, element("span", cell, class_=f"status {cell}"), **attributes)
    return element(kind, breakable(str(cell)), **attributes)
