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
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import grain
import jax

from longctx_jax import run_files
from longctx_jax.data import make_iterator
from longctx_jax.models.decoder import Decoder
from longctx_jax.training.checkpoint import Checkpointer, Restored, has_checkpoints
from longctx_jax.training.curriculum import cut_rows, row_len
from longctx_jax.training.inputs import Inputs, require_same_inputs, write_inputs
from longctx_jax.training.optimizer import make_optimizer
from longctx_jax.training.placement import ONE_DEVICE, Placement, with_shardings
from longctx_jax.training.processes import is_main_process
from longctx_jax.training.profiling import ProfilerWindow
from longctx_jax.training.reporter import Reporter
from longctx_jax.training.signals import Stop, stop_on_signals
from longctx_jax.training.start import (
    carried_cache_len,
    check_config,
    require_same_config,
    resolved,
    with_weights_of,
)
from longctx_jax.training.state import TrainState, init_state
from longctx_jax.training.step import make_train_step
from longctx_jax.training.watchdog import Watchdog
from longctx_jax.training.workdir_lock import locked
from longctx_jax.typing import PyTree

Evaluate = Callable[[TrainState], dict[str, float]]
Sample = Callable[[TrainState], list[dict[str, str]]]  # -> prompt and text of each sample


@dataclasses.dataclass(frozen=True)
class TrainData:
    """What the loop needs to know about the data."""

    dataset: grain.MapDataset  # item s = the batch of step s, of this process's rows
    position_of: Callable[[int], str]  # step -> where its data lies, for messages
    is_bytes: bool  # one token is one byte, so the training loss has a bits-per-byte
    fingerprint: str = ""  # of the text; a run goes on only with the text it began with
    inputs: Inputs = Inputs()  # it, the other texts and the tokenizer
    require_unchanged: Callable[[], None] = lambda: None  # raises if the text was overwritten


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
    if has_checkpoints(workdir):
        require_same_inputs(workdir, data.inputs)
    workdir.mkdir(parents=True, exist_ok=True)
    lock = locked(workdir) if is_main_process() else contextlib.nullcontext()
    with lock, stop_on_signals() as stop, placement.context():
        checkpointer = Checkpointer(  # inside the lock: it clears away unfinished saves
            workdir, keep_latest=config.train.keep_latest, keep_every=config.train.keep_every
        )
        with contextlib.closing(checkpointer):  # a save under way ends even if the run has failed
            run = _Run(config, workdir, model, data, evaluate, checkpointer, placement, sample)
            with contextlib.closing(run):
                if is_main_process():  # the run is possible: claim the folder
                    run_files.write_json(workdir / run_files.CONFIG, resolved(config))
                    write_inputs(workdir, data.inputs)
                    (workdir / run_files.DONE).unlink(missing_ok=True)
                return run.go(stop)


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
        self.tx, schedule = make_optimizer(config.optim, config.train.n_steps)
        self.state = self._start()
        self.step = int(self.state.step)
        self.reporter = Reporter(
            config,
            workdir,
            self.step,
            schedule=schedule,
            position_of=data.position_of,
            is_bytes=data.is_bytes,
        )
        self.watchdog = Watchdog(
            workdir,
            config.log.hang_timeout_s,
            process_index=jax.process_index(),
            must_exit=config.log.hang_exit,
        )
        self.profiler = ProfilerWindow(
            workdir / "profile", config.train.profile_start, config.train.profile_steps
        )

    def close(self):
        self.watchdog.close()
        self.reporter.close()

    def go(self, stop: Stop) -> dict[str, Any]:
        config, n_steps, reporter = self.config, self.config.train.n_steps, self.reporter
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
        reporter.restart()
        while self.step < n_steps and not self._must_stop(stop):
            self.watchdog.pat()
            if self.profiler.is_over(self.step):
                self.profiler.close(self.state.params)
            self.profiler.at(self.step)
            start = time.monotonic()
            batch = cut_rows(next(batches), row_len(config, self.step))
            wait_s = time.monotonic() - start
            votes = self.placement.vote(bool(stop.signal_name))
            batch = self.placement.put_batch(batch)
            self.state, metrics = train_step(self.state, batch, votes)
            reporter.flush()
            self.step += 1
            reporter.took(self.step, metrics, wait_s)
            is_last = self.step == n_steps
            if is_last or self._is_due(config.train.checkpoint_every):
                self._save()
            if is_last or (self._is_due(config.eval.every) and not self._must_stop(stop)):
                results = self._evaluate()
            if self.sample is not None and self._is_due(config.eval.sample_every):
                with reporter.aside():
                    reporter.write_samples(self.step, self.sample(self.state))
        self.watchdog.close()  # from here on nothing repeats
        reporter.flush()
        self.profiler.close(self.state.params)
        if self.step < n_steps:
            who = stop.signal_name or "stop of another process"
            print(f"{who}: saving step {self.step}", file=sys.stderr, flush=True)
        if reporter.saved_step != self.step:
            self._save()
        self.checkpointer.wait()
        record = {"step": self.step, "is_finished": self.step >= n_steps}
        if record["is_finished"]:
            record["eval"] = results or self._evaluate()
            if is_main_process():
                run_files.write_json(self.workdir / run_files.DONE, record)
        return record

    def _is_due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0 = never) happens after this one."""
        return every > 0 and self.step % every == 0

    def _must_stop(self, stop: Stop) -> bool:
        """Whether to end after this step; the same answer on all processes."""
        return self.reporter.votes > 0 if jax.process_count() > 1 else bool(stop.signal_name)

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
        layout = self.placement.layout(self.config, self.model, shapes)
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
            state = with_weights_of(train_config.init_from, self.model, state, self.data.inputs)
        return state

    def _save(self) -> None:
        with self.reporter.aside():  # a state that is not finite must never be saved
            start = time.monotonic()
            self.data.require_unchanged()  # or it would be saved as trained on the old text
            self.checkpointer.save(
                self.step, self.state, self.config.to_dict(), fingerprint=self.data.fingerprint
            )
            self.reporter.saved(self.step, time.monotonic() - start)

    def _evaluate(self) -> dict[str, float]:
        with self.reporter.aside():
            results = self.evaluate(self.state)
        self.reporter.write_evaluation(self.step, results)
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
