"""Runs to be harmed: real calls of `scripts.train` on tiny models, forked so that a start is cheap.

The process that makes them has imported what a run needs and has never used a device, so a fork is
a fresh start without the seconds of importing.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from longctx_jax.benchmarking.environment import without_paths

FIELDS: dict[str, Any] = {
    "model.n_layers": 2,
    "model.d_model": 16,
    "model.n_heads": 2,
    "data.name": "text",
    "data.seq_len": 16,
    "data.global_batch_size": 4,
    "data.n_workers": 1,
    "optim.warmup_steps": 2,
    "optim.schedule": "constant",
    "train.n_steps": 8,
    "train.checkpoint_every": 2,
    "train.keep_latest": 3,
    "eval.every": 0,
    "eval.max_bytes": 500,
    "log.every": 1,
    "log.tensorboard": False,
}
MODELS: dict[str, dict[str, Any]] = {  # with every kind of state a run carries
    "decay": {"model.name": "decay"},
    "vq": {"model.name": "transformer_vq", "model.vq.codebook_size": 8, "train.ema_decay": 0.9},
    "armt": {
        "model.name": "recurrent_memory",
        "model.memory.segment_len": 4,
        "model.memory.n_memory_tokens": 2,
    },
    "transformer": {"model.name": "transformer", "model.dropout": 0.1},
}
TIMEOUT_S = 300.0
POLL_S = 0.01


@dataclasses.dataclass
class Outcome:
    """How often a fault was injected, and what came of it."""

    fault: str
    detail: str
    n: int = 1  # injections
    n_survived: int = 0  # ... after which the run went on, to the undisturbed run's state
    n_refused: int = 0  # ... after which it stopped with a message that says what to do
    n_lost: int = 0  # checkpoints that were there before and not after
    note: str = ""
    seconds: float = 0.0  # since the first of its group began

    @property
    def is_well(self) -> bool:
        """Whether every injection was survived or refused, and nothing was lost."""
        return self.n_survived + self.n_refused == self.n and self.n_lost == 0


@dataclasses.dataclass
class Victim:
    """A forked run."""

    pid: int
    workdir: pathlib.Path
    log: pathlib.Path
    exit_code: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code (negative: the signal that ended it), None while it runs."""
        if self.exit_code is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.exit_code = os.waitstatus_to_exitcode(status)
        return self.exit_code

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Returns the exit code.

        Raises:
            TimeoutError: it runs on after timeout_s; it is killed then.
        """
        end = time.monotonic() + timeout_s
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill(signal.SIGKILL)
                self.wait()
                raise TimeoutError(f"{self.workdir.name} hung for {timeout_s:.0f} s")
            time.sleep(POLL_S)
        assert self.exit_code is not None
        return self.exit_code

    def kill(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def text(self) -> str:
        """Returns what it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def is_training(self) -> bool:
        """Whether it has trained a step, or has ended."""
        return self.poll() is not None or "step=" in self.text()


class Victims:
    """Makes runs below a folder, on a text of their own.

    Args:
        folder: for the runs; it must be empty or missing.
        seed: of the moments at which faults strike.
    """

    def __init__(self, folder: str | os.PathLike[str], seed: int = 0):
        self.folder = pathlib.Path(folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise ValueError(f"--keep must be an empty folder: {folder} is not; name another")
        self.seed = seed
        self.text = self.folder / "text.txt"
        write_text(self.text)
        self._n_logs = 0

    def start(
        self,
        workdir: pathlib.Path,
        fields: Mapping[str, Any],
        *,
        flags: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
        inject: Callable[[], None] | None = None,
    ) -> Victim:
        """Starts (or resumes) a run.

        Args:
            workdir: of the run.
            fields: of the config, over `FIELDS`.
            flags: others of scripts.train.
            environment: variables to add.
            inject: called in the new process before anything else.
        """
        self._n_logs += 1
        log = self.folder / "logs" / f"{self._n_logs:04d}-{workdir.name}.txt"
        log.parent.mkdir(exist_ok=True)
        values = FIELDS | {"data.files": (str(self.text),)} | dict(fields)
        arguments = [f"--config.{name}={value}" for name, value in values.items()]
        argv = ["scripts/train.py", "--config=configs/base.py", f"--workdir={workdir}"]
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _become([*argv, *arguments, *flags], log, environment or {}, inject)
        return Victim(pid, workdir, log)

    def finish(self, workdir: pathlib.Path, fields: Mapping[str, Any], **options: Any) -> Victim:
        """`start`, and waits for its end."""
        victim = self.start(workdir, fields, **options)
        victim.wait()
        return victim

    def undisturbed(self, fields: Mapping[str, Any], **options: Any) -> dict[str, str]:
        """Returns the checksums of the final state of a run that nothing happens to."""
        workdir = self.folder / f"undisturbed-{self._n_logs}"
        victim = self.finish(workdir, {**fields, "train.checkpoint_every": 1_000_000}, **options)
        if victim.exit_code != 0:
            raise RuntimeError(f"an undisturbed run fails:\n{victim.text()[-2000:]}")
        return final_state(workdir)


def _become(argv, log, environment, inject) -> None:
    """Turns a forked process into a call of scripts.train; never returns."""
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(descriptor, number)
        os.environ.update(environment)
        if inject is not None:
            inject()
        sys.argv = argv
        runpy.run_module("scripts.train", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def write_text(path: pathlib.Path, n_lines: int = 4000) -> None:
    """Writes some text, the same each time."""
    words = (
        "memory",
        "segment",
        "layer",
        "cache",
        "token",
        "window",
        "gate",
        "value",
        "query",
        "key",
    )
    lines = (" ".join(words[(i * 7 + j * j) % 10] for j in range(6)) for i in range(n_lines))
    path.write_text("\n".join(lines) + "\n")


def steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of whole checkpoints, oldest first."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def is_saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is only half there at this instant."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return any(not name.isdigit() for name in names)


def final_state(workdir: pathlib.Path) -> dict[str, str]:
    """Returns the checksums of the newest checkpoint's arrays, with its step."""
    newest = steps(workdir)[-1]
    meta = json.loads((workdir / "checkpoints" / str(newest) / "meta" / "metadata").read_text())
    found = {name: leaf["checksum"] for name, leaf in meta["leaves"].items()}
    return found | {"at": str(meta["step"])}


def was_refused(victim: Victim) -> bool:
    """Whether a run ended with a message for its user."""
    lines = victim.text().strip().splitlines() or [""]
    return bool(victim.exit_code) and lines[-1].startswith("error: ")


def error_of(victim: Victim) -> str:
    """Returns the message, shortened and without folders."""
    lines = [line for line in victim.text().splitlines() if line.startswith("error: ")]
    text = lines[-1].removeprefix("error: ") if lines else f"exit code {victim.exit_code}"
    return without_paths(text)[:160]


def wait_until_training(victim: Victim) -> None:
    """Returns when a run trains, or has ended."""
    end = time.monotonic() + TIMEOUT_S
    while not victim.is_training():
        if time.monotonic() > end:
            raise TimeoutError(f"{victim.workdir.name} did not train within {TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)
