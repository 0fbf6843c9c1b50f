"""Where metrics go: one small writer protocol for console, JSON lines, TensorBoard and W&B.

A metric record is a step (number of parameter updates done) and a flat dict of floats. Names used
by the training loop: `loss` (nats a token), `bits_per_byte`, `tokens_per_s`, `learning_rate`,
`grad_norm`, `tokens` (seen since step 0), `seconds` (of training since step 0) and `eval/<name>`.
`metrics.jsonl` is the record that plots and tests read; the others are views of it.
Deliberately not here: averaging, device transfers and the choice of the process that writes.
"""

import collections
import contextlib
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TextIO

from absl import logging

from longctx_jax import json_files, run_files

MAX_BYTES = 1 << 27  # of a metrics.jsonl: about half a million records
_RATE_RECORDS = 10  # the ETA uses the speed over this many console records
_CONSOLE_ORDER = ("loss", "bits_per_byte", "tokens_per_s", "learning_rate", "grad_norm")
_CONSOLE_HIDDEN = ("tokens", "seconds")


class MetricWriter(Protocol):
    """Takes metric records in the order of their steps."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records `scalars` (anything that `float` accepts) at `step`."""
        ...

    def close(self) -> None:
        """Writes out what is pending; the writer is not used afterwards. May be called twice."""
        ...


def make_writer(
    workdir: str | os.PathLike[str],
    *,
    n_steps: int = 0,
    tensorboard: bool = True,
    wandb: bool = False,
    wandb_project: str = "longctx_jax",
    resume_step: int = 0,
    run_config: Mapping[str, Any] | None = None,
) -> "CompositeWriter":
    """Console and `metrics.jsonl` always, TensorBoard and W&B where asked for.

    Args:
        workdir: folder of the run; created if missing.
        n_steps: of the whole run, for progress and the time left; 0 = unknown.
        tensorboard: also write TensorBoard events into `workdir/tensorboard`.
        wandb: also log to Weights & Biases (extra `wandb`).
        wandb_project: name of the project there.
        resume_step: step of the restored checkpoint; older records of later steps, which this
            run will write again, are dropped. 0 = a fresh run, which drops all.
        run_config: nested dict with the run's config, shown by W&B.

    Raises:
        ImportError: if `wandb` is asked for and not installed.
    """
    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    writers: list[MetricWriter] = []
    if wandb:  # first: it is the one that can fail
        writers.append(WandbWriter(folder, project=wandb_project, run_config=run_config))
    writers.append(JsonLinesWriter(folder / run_files.METRICS, resume_step=resume_step or -1))
    if tensorboard:
        writers.append(TensorBoardWriter(folder / run_files.TENSORBOARD, resume_step=resume_step))
    writers.append(ConsoleWriter(n_steps))
    return CompositeWriter(*writers)


class CompositeWriter:
    """Passes every record to each of several writers, in order."""

    def __init__(self, *writers: MetricWriter):
        self.writers = writers

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records `scalars` at `step` in every writer."""
        values = {name: float(value) for name, value in scalars.items()}
        for writer in self.writers:
            writer.write(step, values)

    def close(self) -> None:
        """Closes every writer, also when one of them fails; then raises that error."""
        with contextlib.ExitStack() as stack:
            for writer in reversed(self.writers):
                stack.callback(writer.close)


class JsonLinesWriter:
    """One JSON object a line, flushed at once, so that a killed run keeps what it wrote.

    Numbers JSON cannot hold (nan, inf) are written as null. A torn last line, left by a kill in the
    middle of a write, is dropped.

    Args:
        path: the file; its folder must exist. Records are appended.
        resume_step: records of later steps are dropped first (the file is replaced as a whole);
            None keeps all.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None):
        self.path = pathlib.Path(path)
        if self.path.exists():
            _rewrite(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one line."""
        record: dict[str, Any] = {"step": int(step)}
        for name, value in scalars.items():
            number = float(value)
            record[name] = number if math.isfinite(number) else None
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in file order; a null is returned as nan.

    Lines that are not a JSON object of numbers with `step` (a torn write) are skipped with one
    warning.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is larger than MAX_BYTES.
    """
    raw = json_files.read_limited(path, MAX_BYTES, remedy="it is no record of a run: move it away")
    lines = raw.decode("utf-8", errors="replace").split("\n")  # as files are iterated
    records = [record for record in map(_parse_line, lines) if record is not None]
    n_skipped = sum(bool(line.strip()) for line in lines) - len(records)
    if n_skipped:
        logging.warning("skipped unreadable lines: path=%s n_lines=%d", path, n_skipped)
    return [{k: math.nan if v is None else v for k, v in r.items()} for r in records]


class TensorBoardWriter:
    """TensorBoard events through tensorboardX (neither TensorFlow nor PyTorch is needed).

    Args:
        folder: of the event files.
        resume_step: TensorBoard hides older events of later steps.
    """

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int = 0):
        import tensorboardX

        purge_step = resume_step + 1 if os.path.isdir(folder) else None
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds one event a scalar."""
        for name, value in scalars.items():
            tag = name if "/" in name else f"train/{name}"
            self._writer.add_scalar(tag, float(value), int(step))

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class WandbWriter:
    """Weights & Biases; a resumed work directory continues its old run there.

    Args:
        folder: the work directory; holds `wandb_id.txt`, and its name is the run's name.
        project: name of the project.
        run_config: nested dict with the run's config.

    Raises:
        ImportError: if the package is missing.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        project: str,
        run_config: Mapping[str, Any] | None = None,
    ):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "log.wandb needs the package wandb: it is not installed; "
                "run `make venv EXTRAS=wandb` or set config.log.wandb to False"
            ) from error
        folder = pathlib.Path(folder).resolve()
        id_file = folder / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(wandb.util.generate_id())
        self._run = wandb.init(
            project=project,
            name=folder.name,
            dir=str(folder),
            id=id_file.read_text().strip(),
            resume="allow",
            config=dict(run_config or {}),
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs one record."""
        self._run.log(dict(scalars), step=int(step))

    def close(self) -> None:
        """Marks the run as finished."""
        self._run.finish()


class ConsoleWriter:
    """One line a record: `step=120/1000 loss=1.234 tokens_per_s=12345 eta=3m10s`.

    Args:
        n_steps: of the whole run; 0 = unknown, then no `eta`.
        stream: default `sys.stderr`, looked up at every write.
        clock: seconds, monotonic; for tests.
    """

    def __init__(
        self,
        n_steps: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._n_steps = n_steps
        self._stream = stream
        self._clock = clock
        self._marks: collections.deque[tuple[int, float]] = collections.deque(
            [], maxlen=_RATE_RECORDS
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Prints one line."""
        names = [name for name in _CONSOLE_ORDER if name in scalars]
        names += [n for n in scalars if n not in _CONSOLE_ORDER and n not in _CONSOLE_HIDDEN]
        fields = [f"step={step}/{self._n_steps}" if self._n_steps else f"step={step}"]
        fields += [f"{name}={_format(float(scalars[name]))}" for name in names]
        remaining_s = self._remaining_s(step)
        if remaining_s is not None:
            fields.append(f"eta={format_duration(remaining_s)}")
        print(" ".join(fields), file=self._stream or sys.stderr, flush=True)

    def close(self) -> None:
        """Does nothing: the stream belongs to others."""

    def _remaining_s(self, step: int) -> float | None:
        """Seconds to the last step at the recent speed; None while it is unknown or over."""
        if not self._marks or step > self._marks[-1][0]:
            self._marks.append((step, self._clock()))
        (first_step, first_s), (last_step, last_s) = self._marks[0], self._marks[-1]
        if last_step == first_step or step >= self._n_steps:
            return None
        return (self._n_steps - step) * (last_s - first_s) / (last_step - first_step)


def format_duration(seconds: float) -> str:
    """Seconds in words: `45s`, `3m10s`, `2h05m`, `1d03h`."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86_400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86_400}d{total % 86_400 // 3600:02d}h"


def _format(value: float) -> str:
    """Whole numbers and thousands without decimals, otherwise four significant digits."""
    if math.isfinite(value) and (abs(value) >= 1000 or value == int(value)):
        return f"{value:.0f}"
    return f"{value:.4g}"


def _parse_line(line: str) -> dict[str, Any] | None:
    """The record on `line`; None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, numbers without end, or nested without end
        return None
    is_record = isinstance(record, dict) and type(record.get("step")) is int
    return record if is_record and all(map(_is_scalar, record.values())) else None


def _is_scalar(value: Any) -> bool:
    """Whether `value` is what this file writes: a float, an int that fits one, or null."""
    return value is None or isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _rewrite(path: pathlib.Path, resume_step: int | None) -> None:
    """Replaces the file, in one rename, by its whole records up to `resume_step`."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path.name} must be at most {MAX_BYTES} bytes: {path} has {path.stat().st_size}; it "
            "is no record of a run: move it away"
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        for line in _kept_lines(path, resume_step):
            file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _kept_lines(path: pathlib.Path, resume_step: int | None) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            record = _parse_line(line)
            if record is not None and (resume_step is None or record["step"] <= resume_step):
                yield line.strip()
