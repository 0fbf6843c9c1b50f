"""The training loop: start or resume, update, report, evaluate, save, stop cleanly.

Where a run starts, in this order: (1) the newest whole checkpoint of its work directory; (2) the
weights of the run that config.train.init_from names, at step 0; (3) fresh weights. Step n is
dispatched before the metrics of step n-1 are fetched, so reporting never stalls the device. SIGTERM
and SIGINT save and return. Of several processes all run this loop in step; a signal to any of them
stops all after the same step, by a vote that travels with the batch; process 0 writes what is not a
checkpoint.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax

from longctx_jax.data import make_iterator
from longctx_jax.models.base import Decoder
from longctx_jax.nn.contract import Mean
from longctx_jax.ops.losses import NATS_PER_BIT
from longctx_jax.training.checkpoint import Checkpointer, Restored
from longctx_jax.training.curriculum import cut_rows, row_len
from longctx_jax.training.metrics import METRICS_FILE, CompositeWriter, make_writer, read_records
from longctx_jax.training.optimizer import make_optimizer
from longctx_jax.training.placement import ONE_DEVICE, Placement, with_shardings
from longctx_jax.training.start import (
    CONFIG_FILE,
    carried_cache_len,
    check_config,
    require_same_config,
    resolved,
    with_weights_of,
    write_json,
)
from longctx_jax.training.state import TrainState, init_state
from longctx_jax.training.step import STOP_VOTES, Metrics, make_train_step
from longctx_jax.training.sweep import DONE_FILE
from longctx_jax.training.watchdog import StepTimes, Watchdog
from longctx_jax.training.workdir_lock import locked
from longctx_jax.typing import PyTree

SAMPLES_FILE = "samples.jsonl"

Evaluate = Callable[[TrainState], dict[str, float]]
Sample = Callable[[TrainState], list[dict[str, str]]]  # -> prompt and text of each sample


class NonFiniteLossError(ValueError):
    """The loss or the gradient became infinite or NaN."""


@dataclasses.dataclass(frozen=True)
class TrainData:
    """What the loop needs to know about the data."""

    dataset: grain.MapDataset  # item s = the batch of step s, of this process's rows
    position_of: Callable[[int], str]  # step -> where its data lies, for messages
    is_bytes: bool  # one token is one byte, so the training loss has a bits-per-byte
    fingerprint: str = ""  # of the text; a run goes on only with the text it began with


@dataclasses.dataclass
class _Stop:
    """Which signal asked to stop; empty = none."""

    signal_name: str = ""


def train(
    config: Any,
    workdir: str | os.PathLike[str],
    model: Decoder,
    data: TrainData,
    evaluate: Evaluate,
    placement: Placement = ONE_DEVICE,
    sample: Sample | None = None,
) -> dict[str, Any]:
    """Trains to config.train.n_steps, or to the next signal, and returns the final record.

    Args:
        config: the whole resolved config.
        workdir: of the run: config.json, metrics.jsonl, tensorboard/, checkpoints/, and at the end
            DONE.json with the returned record.
        evaluate: state -> results on the held-out split.
        placement: of the run's arrays; the model is one that runs there.
        sample: writes text every config.eval.sample_every steps, into samples.jsonl.

    Returns:
        {"step", "is_finished", "eval": {...}}; "eval" only when finished.

    Raises:
        ValueError: the work directory belongs to another config or text, or impossible settings.
        BlockingIOError: another process trains in the work directory.
        NonFiniteLossError: the loss or gradient norm is not finite; the last checkpoint is from
            before.
        CheckpointError: saving failed; older checkpoints are intact.
    """
    workdir = pathlib.Path(workdir)
    check_config(config)
    require_same_config(workdir, config)
    workdir.mkdir(parents=True, exist_ok=True)
    lock = locked(workdir) if is_main_process() else contextlib.nullcontext()
    with lock, _stop_on_signals() as stop, placement.context():
        checkpointer = Checkpointer(  # inside the lock: it clears away unfinished saves
            workdir, keep_latest=config.train.keep_latest, keep_every=config.train.keep_every
        )
        run = _Run(config, workdir, model, data, evaluate, checkpointer, placement, sample)
        if is_main_process():  # the run is possible: claim the folder
            write_json(workdir / CONFIG_FILE, resolved(config))
        try:
            return run.go(stop)
        finally:
            run.close()
            checkpointer.close()  # a save that is under way finishes even if the run has failed


class _Run:
    """One call of `train`: the loop's variables, so that its steps can be small functions."""

    def __init__(
        self, config, workdir, model, data, evaluate, checkpointer: Checkpointer, placement, sample
    ):
        self.config, self.workdir, self.model = config, workdir, model
        self.placement: Placement = placement
        self.sample: Sample | None = sample
        self.shardings: PyTree = None  # of the state; None = one device
        self.data, self.evaluate, self.checkpointer = data, evaluate, checkpointer
        self.tx, self.schedule = make_optimizer(config.optim, config.train.n_steps)
        self.state = self._start()
        self.step = int(self.state.step)
        self.saved_step = self.step if self.step else -1
        self.pending: tuple[int, Metrics] | None = None
        self.window = _Window()
        self.times = StepTimes()
        self.watchdog = Watchdog(
            workdir,
            config.log.hang_timeout_s,
            process_index=jax.process_index(),
            must_exit=config.log.hang_exit,
        )
        self.writer: CompositeWriter | None = None
        self.is_profiling = False
        self.save_s = 0.0  # of this process's waits for saves
        self.votes = 0  # of several processes: how many devices' were asked to stop
        self.tokens_per_step = config.data.global_batch_size * config.data.seq_len

    def close(self):
        self.watchdog.close()
        if self.writer is not None:
            self.writer.close()

    def go(self, stop: _Stop) -> dict[str, Any]:
        config, n_steps = self.config, self.config.train.n_steps
        self.writer = self._make_writer()
        train_step = make_train_step(
            self.model,
            self.tx,
            n_microbatches=config.train.n_microbatches,
            loss_chunk_len=config.train.loss_chunk_len,
            loss_positions=config.train.loss_positions,
            ema_decay=config.train.ema_decay,
            cold_start_every=config.train.cold_start_every,
            cache_len=carried_cache_len(config),
            state_shardings=self.shardings,
        )
        batches = iter(make_iterator(self.data.dataset, self.step, config.data.n_workers))
        results: dict[str, float] = {}
        self.window.restart()
        self.times.skip()
        while self.step < n_steps and not self._must_stop(stop):
            self.watchdog.pat()
            self._profile(self.step)
            start = time.monotonic()
            batch = cut_rows(next(batches), row_len(config, self.step))
            wait_s = time.monotonic() - start
            votes = self.placement.vote(bool(stop.signal_name))
            batch = self.placement.put_batch(batch)
            self.state, metrics = train_step(self.state, batch, votes)
            self._report()
            self.step += 1
            self.pending = (self.step, metrics)
            self.times.add(self.step, wait_s)
            is_last = self.step == n_steps
            if is_last or self.step % config.train.checkpoint_every == 0:
                self._save()
            is_due = config.eval.every and self.step % config.eval.every == 0
            if is_last or (is_due and not self._must_stop(stop)):
                results = self._evaluate()
            if self._is_sample_due():
                self._sample()
        self.watchdog.close()  # from here on nothing repeats
        self._report()
        self._profile(None)
        if self.step < n_steps:
            who = stop.signal_name or "stop of another process"
            print(f"{who}: saving step {self.step}", file=sys.stderr, flush=True)
        if self.saved_step != self.step:
            self._save()
        self.checkpointer.wait()
        record = {"step": self.step, "is_finished": self.step >= n_steps}
        if record["is_finished"]:
            record["eval"] = results or self._evaluate()
            if is_main_process():
                write_json(self.workdir / DONE_FILE, record)
        return record

    def _make_writer(self) -> CompositeWriter:
        """Takes over the folder's records; processes beside the first write none."""
        if not is_main_process():
            return CompositeWriter()
        config = self.config
        (self.workdir / DONE_FILE).unlink(missing_ok=True)
        writer = make_writer(
            self.workdir,
            n_steps=config.train.n_steps,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            wandb_project=config.log.wandb_project,
            resume_step=self.step,
            run_config=config.to_dict(),
        )
        kept = [r["seconds"] for r in read_records(self.workdir / METRICS_FILE) if "seconds" in r]
        self.window.total_s = kept[-1] if kept else 0.0
        return writer

    def _must_stop(self, stop: _Stop) -> bool:
        """Whether to end after this step; the same answer on all processes."""
        return self.votes > 0 if jax.process_count() > 1 else bool(stop.signal_name)

    def _start(self) -> TrainState:
        train_config, data_config = self.config.train, self.config.data

        def fresh():
            return init_state(
                self.model,
                self.tx,
                seed=train_config.seed,
                batch_size=data_config.global_batch_size,
                cache_len=carried_cache_len(self.config),
                use_ema=bool(train_config.ema_decay),
            )

        shapes = jax.eval_shape(fresh)
        layout = self.placement.layout(self.config, shapes)
        if layout is not None:
            assert self.placement.mesh is not None
            self.shardings = layout.shardings(shapes, self.placement.mesh)
            shapes = with_shardings(shapes, self.shardings)
        restored = self.checkpointer.restore_latest(shapes)
        if restored is not None:
            self._require_same_text(restored)
            print(f"resuming at step {restored.step}", file=sys.stderr, flush=True)
            return restored.state
        # Spread from the start: no device ever holds the whole state.
        state = jax.jit(fresh, out_shardings=self.shardings)() if self.shardings else fresh()
        if train_config.init_from:
            state = with_weights_of(train_config.init_from, self.model, state)
        return state

    def _report(self) -> None:
        """Fetches the metrics of the last dispatched step, checks them, and logs now and then."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        measured = {n: m for n, m in metrics.items() if not isinstance(m, Mean) or m.count > 0}
        scalars = {name: float(value) for name, value in measured.items()}
        self.votes = int(scalars.pop(STOP_VOTES, 0))
        if not (math.isfinite(scalars["loss"]) and math.isfinite(scalars["grad_norm"])):
            raise NonFiniteLossError(
                f"loss and gradient must be finite: step {step} has loss={scalars['loss']}, "
                f"grad_norm={scalars['grad_norm']} at {self.data.position_of(step - 1)}; the last "
                f"checkpoint is step {max(0, self.saved_step)}: lower config.optim.learning_rate "
                "or config.optim.clip_norm and continue from it with config.train.init_from"
            )
        self.window.add(scalars["loss"])
        every = self.config.log.every
        if step % every and step != self.config.train.n_steps and step != 1:
            return
        loss, steps_per_s = self.window.read()
        scalars["loss"] = loss
        if self.data.is_bytes:
            scalars["bits_per_byte"] = loss / NATS_PER_BIT
        scalars |= {
            "learning_rate": float(self.schedule(step - 1)),
            "tokens_per_s": steps_per_s * self.tokens_per_step,
            "tokens": step * self.tokens_per_step,
            "seconds": self.window.total_s,
            "save_seconds": self.save_s,
            **self.times.read(),
        }
        assert self.writer is not None
        self.writer.write(step, scalars)

    def _save(self) -> None:
        self._report()  # a state that is not finite must never be saved
        with self.window.paused():
            start = time.monotonic()
            self.checkpointer.save(
                self.step, self.state, self.config.to_dict(), fingerprint=self.data.fingerprint
            )
            self.save_s += time.monotonic() - start
        self.times.skip()
        self.saved_step = self.step

    def _evaluate(self) -> dict[str, float]:
        self._report()
        with self.window.paused():
            results = self.evaluate(self.state)
        self.times.skip()
        assert self.writer is not None
        self.writer.write(self.step, {f"eval/{name}": value for name, value in results.items()})
        return {"split": self.config.eval.split, **results}

    def _require_same_text(self, restored: Restored) -> None:
        before, now = restored.data.get("fingerprint", ""), self.data.fingerprint
        if before and now and before != now:
            raise ValueError(
                f"a run goes on with the text it began with: {self.workdir} was trained on one "
                f"with digest {before[:16]} up to step {restored.step}, and config.data.name="
                f"{self.config.data.name!r} is one with {now[:16]} now; put the old files back, or "
                "start a new --workdir (config.train.init_from takes weights over)"
            )

    def _is_sample_due(self) -> bool:
        every = self.config.eval.sample_every
        return self.sample is not None and every > 0 and self.step % every == 0

    def _sample(self) -> None:
        """Appends what the model writes now to samples.jsonl."""
        self._report()
        assert self.sample is not None
        with self.window.paused():
            samples = self.sample(self.state)
        self.times.skip()
        if is_main_process():
            with (self.workdir / SAMPLES_FILE).open("a") as file:
                for one in samples:
                    file.write(json.dumps({"step": self.step, **one}) + "\n")

    def _profile(self, step: int | None) -> None:
        """Starts and stops the profiler window; step None = the run ends."""
        config = self.config.train
        if not config.profile_steps:
            return
        first = max(config.profile_start, 1)
        if step == first:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self.is_profiling = True
        elif self.is_profiling and (step is None or step >= first + config.profile_steps):
            jax.block_until_ready(self.state.params)
            jax.profiler.stop_trace()
            self.is_profiling = False


class _Window:
    """Loss and speed since the last record; time spent saving and evaluating does not count."""

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


def is_main_process() -> bool:
    """Whether this process is the one that writes what all know."""
    return jax.process_index() == 0


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[_Stop]:
    """SIGTERM and SIGINT set the flag; the same signal again acts as it used to."""
    stop = _Stop()
    before = {}

    def handle(number, frame):
        del frame
        stop.signal_name = signal.Signals(number).name
        signal.signal(number, before[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
