"""The recorded table of measurements: what each form took on a device, at a grid of shapes.

One JSON file a kind of device lies in `tables/`, written by
`python -m scripts.benchmark --suite=decay --record`. A call whose shape is near a recorded one is
decided by what was measured there; others by `cost.py`.
"""

import functools
import json
import math
import pathlib
from typing import Any

from longctx_jax.ops.decay.facts import Facts

FOLDER = pathlib.Path(__file__).parent / "tables"
NEAR = 2.0  # doublings: sum over the axes (batch * heads, seq, key width, value width)


def table_path(device: str, folder: pathlib.Path | None = None) -> pathlib.Path:
    """Returns the file of a kind of device, e.g. tables/nvidia_h200.json."""
    return (folder or FOLDER) / f"{device.lower().replace(' ', '_')}.json"


@functools.cache
def load_table(device: str) -> tuple[dict[str, Any], ...]:
    """Returns the rows recorded for a kind of device, () if there are none; read once.

    A row has dtype, batch, seq, heads, d_key, d_value, is_per_token, and the dicts forward_ms and
    training_ms (forward and backward) from the form's name to milliseconds.
    """
    path = table_path(device)
    if not path.exists():
        return ()
    return tuple(json.loads(path.read_text())["rows"])


def nearest_row(facts: Facts, rows: tuple[dict[str, Any], ...]) -> dict[str, Any] | None:
    """Returns the recorded row closest in shape, of the same dtype and kind of decay; or None."""
    found = [
        (distance, i)
        for i, row in enumerate(rows)
        if row["dtype"] == facts.dtype and row["is_per_token"] == facts.is_per_token
        if (distance := _distance(facts, row)) <= NEAR
    ]
    return rows[min(found)[1]] if found else None


def _distance(facts: Facts, row: dict[str, Any]) -> float:
    """Returns how many doublings lie between a call's shape and a row's."""
    ours = (facts.batch * facts.heads, facts.seq, facts.d_key, facts.d_value)
    theirs = (row["batch"] * row["heads"], row["seq"], row["d_key"], row["d_value"])
    return sum(abs(math.log2(a / b)) for a, b in zip(ours, theirs, strict=True))


def write_table(
    device: str,
    rows: list[dict[str, Any]],
    about: dict[str, Any],
    folder: pathlib.Path | None = None,
) -> pathlib.Path:
    """Writes the rows of a kind of device, replacing its file; returns the path.

    Args:
        device: jax's device_kind.
        rows: see `load_table`.
        about: versions, date and command of the recording.
        folder: where tables lie; None = `FOLDER`.
    """
    path = table_path(device, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    head = f'{{"device": {json.dumps(device)}, "about": {json.dumps(about)},\n "rows": [\n'
    text = f"{head}{lines}\n]}}\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)
    load_table.cache_clear()
    return path
