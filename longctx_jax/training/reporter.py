"""What a training run says of itself: losses, speed, stalls, evaluations, samples.

The metrics of a step are held back until the next one has been dispatched, so that fetching them
never stalls the device. Time spent saving, evaluating and sampling counts in no speed.
"""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from longctx_jax import run_files
from longctx_jax.nn.contract import Mean
from longctx_jax.ops.losses import NATS_PER_BIT
from longctx_jax.training.metrics import CompositeWriter, make_writer, read_records
from longctx_jax.training.processes import is_main_process
from longctx_jax.training.step import STOP_VOTES, Metrics
from longctx_jax.training.watchdog import StepTimes


class NonFiniteLossError(ValueError):
    """The loss or the gradient became infinite or NaN."""


class Reporter:
    """Writes the records of one call of `train`; only the first of several processes writes.

    Takes over the folder's records up to `step`, the step the run starts from.

    Args:
        schedule: step -> learning rate.
        position_of: step -> where its data lies, for messages.
        is_bytes: one token is one byte, so the loss has a bits-per-byte.
    """

    def __init__(
        self,
        config: Any,
        workdir: pathlib.Path,
        step: int,
        *,
        schedule: Callable[[int], Any],
        position_of: Callable[[int], str],
        is_bytes: bool,
    ):
        self._workdir, self._schedule = workdir, schedule
        self._position_of, self._is_bytes = position_of, is_bytes
        self._every, self._n_steps = config.log.every, config.train.n_steps
        self._tokens_per_step = config.data.global_batch_size * config.data.seq_len
        self._pending: tuple[int, Metrics] | None = None
        self._window = _Window()
        self._times = StepTimes()
        self._save_s = 0.0  # this process's waits for saves
        self.saved_step: int | None = step or None  # of the newest checkpoint
        self.votes = 0  # of several processes: how many devices' were asked to stop
        self._writer = CompositeWriter()
        if is_main_process():
            self._writer = make_writer(
                workdir,
                n_steps=config.train.n_steps,
                tensorboard=config.log.tensorboard,
                wandb=config.log.wandb,
                wandb_project=config.log.wandb_project,
                resume_step=step,
                run_config=config.to_dict(),
            )
            kept = [
                r["seconds"] for r in read_records(workdir / run_files.METRICS) if "seconds" in r
            ]
            self._window.total_s = kept[-1] if kept else 0.0

    def close(self) -> None:
        """Writes out what the writers hold."""
        self._writer.close()

    def restart(self) -> None:
        """Says that the first step comes now: time before it does not count."""
        self._window.restart()
        self._times.skip()

    def took(self, step: int, metrics: Metrics, wait_s: float) -> None:
        """Takes the metrics of a step just dispatched, and how long its batch was waited for."""
        self._pending = (step, metrics)
        self._times.add(step, wait_s)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """The pending metrics are dealt with first; time inside counts in no speed."""
        self.flush()
        with self._window.paused():
            yield
        self._times.skip()

    def flush(self) -> None:
        """Fetches the metrics of the last dispatched step, checks them, and logs now and then.

        Raises:
            NonFiniteLossError: loss or gradient norm are not finite.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        measured = {n: m for n, m in metrics.items() if not isinstance(m, Mean) or m.count > 0}
        scalars = {name: float(value) for name, value in measured.items()}
        self.votes = int(scalars.pop(STOP_VOTES, 0))
        self._require_finite(step, scalars)
        self._window.add(scalars["loss"])
        if step % self._every and step != self._n_steps and step != 1:
            return
        loss, steps_per_s = self._window.read()
        scalars["loss"] = loss
        if self._is_bytes:
            scalars["bits_per_byte"] = loss / NATS_PER_BIT
        scalars |= {
            "learning_rate": float(self._schedule(step - 1)),
            "tokens_per_s": steps_per_s * self._tokens_per_step,
            "tokens": step * self._tokens_per_step,
            "seconds": self._window.total_s,
            "save_seconds": self._save_s,
            **self._times.read(),
        }
        self._writer.write(step, scalars)

    def _require_finite(self, step: int, scalars: Mapping[str, float]) -> None:
        if not (math.isfinite(scalars["loss"]) and math.isfinite(scalars["grad_norm"])):
            raise NonFiniteLossError(
                f"loss and gradient must be finite: step {step} has loss={scalars['loss']}, "
                f"grad_norm={scalars['grad_norm']} at {self._position_of(step - 1)}; the last "
                f"checkpoint is step {self.saved_step or 0}: lower config.optim.learning_rate "
                "or config.optim.clip_norm and continue from it with config.train.init_from"
            )

    def saved(self, step: int, seconds: float) -> None:
        """Says that a checkpoint was taken, and how long the loop waited for it."""
        self.saved_step = step
        self._save_s += seconds

    def write_evaluation(self, step: int, results: Mapping[str, float]) -> None:
        """Records what an evaluation found."""
        self._writer.write(step, {f"eval/{name}": value for name, value in results.items()})

    def write_samples(self, step: int, samples: Sequence[Mapping[str, str]]) -> None:
        """Appends what the model wrote to samples.jsonl."""
        if is_main_process():
            with (self._workdir / run_files.SAMPLES).open("a") as file:
                for sample in samples:
                    file.write(json.dumps({"step": step, **sample}) + "\n")


class _Window:
    """Loss and speed since the last record."""

    def __init__(self):
        self.total_s = 0.0
        self.restart()

    def restart(self):
        self._losses: list[float] = []
        self._start = time.monotonic()
        self._paused_s = 0.0

    def add(self, loss: float):
        self._losses.append(loss)

    @contextlib.contextmanager
    def paused(self):
        start = time.monotonic()
        yield
        self._paused_s += time.monotonic() - start

    def read(self) -> tuple[float, float]:
        """Returns the mean loss and the steps a second, and starts the next window."""
        seconds = time.monotonic() - self._start - self._paused_s
        self.total_s += seconds
        loss, speed = sum(self._losses) / len(self._losses), len(self._losses) / max(seconds, 1e-9)
        self.restart()
        return loss, speed
