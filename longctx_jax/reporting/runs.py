"""What a run's folder tells: its config, metrics, result, samples, size and state.

Metrics are the records of `longctx_jax.training.metrics`, cleaned: steps are whole numbers, all
other values floats. Deliberately not here: restoring checkpoints; comparing runs (`tables.py`).
"""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from longctx_jax import run_files
from longctx_jax.reporting import files

RUNNING_S = 600  # a run that wrote metrics this recently counts as running
MAX_METRIC_NAMES = 500
MAX_CONFIG_FIELDS = 2_000
MAX_SAMPLES = 20  # the newest
MAX_SAMPLE_CHARS = 4_000
_TAIL_BYTES = 4_096  # of the log
_ERROR = re.compile(r"^(error: |Traceback \(most recent call last\)|\w*(Error|Exception): )")

Record = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A text that the run's model wrote during training."""

    step: int
    prompt: str
    text: str


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, as its folder tells it; whatever is missing is empty, and `notes` say why."""

    folder: pathlib.Path
    name: str
    config: Mapping[str, Any]  # dotted field -> value
    records: tuple[Record, ...]
    result: Mapping[str, float]  # of DONE.json
    samples: tuple[Sample, ...]
    n_parameters: int | None
    status: str  # finished, failed, running or unfinished
    notes: tuple[str, ...]

    @property
    def is_bytes(self) -> bool:
        """Whether the run counts bits per byte while it trains, or has no record that tells."""
        names = {name for record in self.records for name in record}
        return "bits_per_byte" in names or "loss" not in names

    def last(self, name: str) -> float:
        """The last finite value recorded under `name`; nan if there is none."""
        values = (record.get(name, math.nan) for record in reversed(self.records))
        return next(filter(math.isfinite, values), math.nan)


def load_run(folder: pathlib.Path, name: str, now_s: float) -> Run:
    """Reads the run in `folder`; damage ends up in its notes.

    Args:
        folder: of the run.
        name: for the page.
        now_s: seconds since the epoch; a run that wrote shortly before is running.
    """
    config, config_notes = files.read_object(folder / run_files.CONFIG)
    fields = flatten(config)
    lines, metric_notes = files.read_lines(folder / run_files.METRICS)
    records, record_notes = _records(lines)
    is_done = (folder / run_files.DONE).exists()
    done, done_notes = files.read_object(folder / run_files.DONE) if is_done else ({}, [])
    samples, sample_notes = _samples(folder / run_files.SAMPLES)
    status, status_notes = _status(folder, done, now_s)
    if len(fields) > MAX_CONFIG_FIELDS:
        config_notes.append(
            f"{run_files.CONFIG}: only the first {MAX_CONFIG_FIELDS} fields are shown"
        )
    notes = config_notes + metric_notes + record_notes + done_notes + sample_notes + status_notes
    evaluation = done.get("eval")
    return Run(
        folder=folder,
        name=name,
        config=dict(list(fields.items())[:MAX_CONFIG_FIELDS]),
        records=tuple(records),
        result=_numbers(evaluation) if isinstance(evaluation, dict) else {},
        samples=tuple(samples),
        n_parameters=checkpoint_parameters(folder),
        status=status,
        notes=tuple(notes),
    )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by dotted name; an empty dict is a leaf."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + str(name)] = value
    return flat


def checkpoint_parameters(folder: pathlib.Path) -> int | None:
    """How many parameters the newest checkpoint holds, from the shapes in its description.

    Shapes are those of what one device wrote, so a checkpoint of sharded arrays tells nothing.
    """
    steps = (p for p in folder.glob("checkpoints/*/state") if p.parent.name.isdecimal())
    newest = max(steps, key=lambda path: int(path.parent.name[:20]), default=None)
    if newest is None or "NamedSharding" in files.read_tail(newest / "_sharding", 2**20):
        return None
    leaves = files.read_object(newest / "_METADATA")[0].get("tree_metadata", {})
    try:
        params = [leaf for leaf in leaves.values() if leaf["key_metadata"][0]["key"] == "params"]
        values = [leaf["value_metadata"] for leaf in params]
        arrays = [value for value in values if not value["skip_deserialize"]]  # others are empty
        return sum(math.prod(array["write_shape"]) for array in arrays) or None
    except (AttributeError, IndexError, KeyError, TypeError):  # another version of the description
        return None


def _records(lines: list[dict]) -> tuple[list[Record], list[str]]:
    """The metric records among `lines`: those with a step."""
    records: list[Record] = [
        {"step": step, **{k: v for k, v in _numbers(line).items() if k != "step"}}
        for line in lines
        if (step := files.step_of(line)) is not None
    ]
    notes = []
    if len(records) < len(lines):
        notes.append(f"{run_files.METRICS}: {len(lines) - len(records)} records have no step")
    names = dict.fromkeys(name for record in records for name in record)
    if len(names) > MAX_METRIC_NAMES:
        kept = set(list(names)[:MAX_METRIC_NAMES])
        records = [{k: v for k, v in record.items() if k in kept} for record in records]
        notes.append(f"only the first {MAX_METRIC_NAMES} of {len(names)} metrics are shown")
    return records, notes


def _numbers(content: Mapping[str, Any]) -> dict[str, float]:
    """The values that are numbers, or null, which is how nan is recorded."""
    return {
        name: files.number(value)
        for name, value in content.items()
        if value is None or isinstance(value, int | float)
    }


def _samples(path: pathlib.Path) -> tuple[list[Sample], list[str]]:
    """The newest samples of the run; no note where it draws none."""
    if not path.exists():
        return [], []
    lines, notes = files.read_lines(path)
    found = [
        Sample(step, _text(line.get("prompt", "")), _text(line.get("text", "")))
        for line in lines
        if (step := files.step_of(line)) is not None
    ]
    if len(found) < len(lines):
        notes.append(f"{path.name}: {len(lines) - len(found)} samples have no step")
    if len(found) > MAX_SAMPLES:
        notes.append(f"only the newest {MAX_SAMPLES} of {len(found)} samples are shown")
    return sorted(found, key=lambda sample: sample.step)[-MAX_SAMPLES:], notes


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= MAX_SAMPLE_CHARS else f"{text[:MAX_SAMPLE_CHARS]} [cut]"


def _status(folder: pathlib.Path, done: dict, now_s: float) -> tuple[str, list[str]]:
    """The state of the run, and for a failed one the last line of its log."""
    if done.get("is_finished") is True:
        return "finished", []
    log = files.read_tail(folder / run_files.LOG, _TAIL_BYTES)
    attempt = log[log.rfind("\n$ ") + 1 :].splitlines()  # a sweep starts each one with its command
    errors = [line for line in attempt if _ERROR.match(line)]
    if errors:
        return "failed", [f"the log ends with: {errors[-1][:1000]}"]
    try:
        age_s = now_s - (folder / run_files.METRICS).stat().st_mtime
    except OSError:
        return "unfinished", []
    return ("running" if age_s < RUNNING_S else "unfinished"), []
