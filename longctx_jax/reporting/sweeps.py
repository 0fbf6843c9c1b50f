"""Tables of sweeps: planned runs by what varies, with what each one reached.

A sweep is a folder with `sweep.json` (see `longctx_jax.training.sweep`), which names the flags of
each run.
"""

import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from longctx_jax.reporting import files, tables
from longctx_jax.reporting.runs import Run
from longctx_jax.training.sweep import PLAN_FILE, parse_setting

_SETTING = re.compile(r"--config\.[^=]+=")


def sweep_tables(runs: Sequence[Run]) -> list[tuple[str, tables.Table]]:
    """The folder's name and the table of each sweep that a run belongs to."""
    folders = dict.fromkeys(run.folder.resolve().parent for run in runs)
    plans = {folder: read_plan(folder) for folder in folders}
    return [(f.name, sweep_table(plan, f, runs)) for f, plan in plans.items() if plan]


def read_plan(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """The settings of each planned run, field -> value as text; empty without a plan."""
    content, _ = files.read_object(folder / PLAN_FILE)
    return {
        name: dict(map(parse_setting, filter(_is_setting, flags)))
        for name, flags in content.items()
        if isinstance(flags, list)
    }


def sweep_table(
    plan: Mapping[str, Mapping[str, str]], folder: pathlib.Path, runs: Sequence[Run]
) -> tables.Table:
    """A row a planned run: status and result, then what varies; best first.

    A run without a flag that others have shows the default that its config holds.
    """
    places = {run.folder.resolve(): index for index, run in enumerate(runs)}
    indices = {name: places.get(folder / name) for name in plan}
    flags = dict.fromkeys(field for values in plan.values() for field in values)
    known = {name: runs[i].config for name, i in indices.items() if i is not None}
    settings = {
        name: {f: values.get(f, tables.value_text(known.get(name, {}).get(f))) for f in flags}
        for name, values in plan.items()
    }
    fields = tables.differing([_present(values) for values in settings.values()])
    rows = [
        {"run": name if index is None else tables.RunCell(index)}
        | ({"status": _absent(folder / name)} if index is None else _outcome(runs[index]))
        | {field: settings[name][field] for field in fields}
        for name, index in sorted(indices.items(), key=lambda pair: _reached(pair[1], runs))
    ]
    return tables.Table.of(rows)


def _present(values: Mapping[str, str | None]) -> dict[str, str]:
    return {field: value for field, value in values.items() if value is not None}


def _reached(index: int | None, runs: Sequence[Run]) -> float:
    bits_per_byte = math.nan if index is None else tables.final(runs[index], "bits_per_byte")
    return math.inf if math.isnan(bits_per_byte) else bits_per_byte


def _outcome(run: Run) -> dict[str, Any]:
    return {
        "status": run.status,
        "steps": int(run.records[-1]["step"]) if run.records else None,
        "bits per byte": tables.final(run, "bits_per_byte"),
        "nats per token": tables.final(run, "nats_per_token"),
        "tokens/s": tables.tokens_per_s(run),
    }


def _absent(folder: pathlib.Path) -> str:
    return "not in this report" if os.path.isdir(folder) else "not started"


def _is_setting(flag: Any) -> bool:
    return isinstance(flag, str) and _SETTING.match(flag) is not None
