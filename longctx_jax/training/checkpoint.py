"""Checkpoints: the only file that touches Orbax.

A checkpoint holds the train state, the data position, and `meta`: format number, resolved config,
library versions, and for every array its shape, dtype and checksum. Orbax makes saving atomic (a
kill leaves the last good step) and asynchronous; the checksums catch what a file system does
afterwards, since the array format itself returns flipped bytes without complaint. Of several
processes each writes its part, all call the same methods, and a checkpoint can be restored on any
other topology.
"""

import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from longctx_jax import run_files
from longctx_jax.training.checksums import checksums
from longctx_jax.typing import PyTree

FORMAT = 2
META_MAX_BYTES = 64_000_000  # of a description; a large one has some 100,000
BYTES_BESIDE_ARRAYS = 1 << 20  # of a checkpoint: descriptions, and room to rename
DAMAGED_FOLDER = "checkpoints_damaged"
VERSIONED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class CheckpointError(OSError):
    """A checkpoint cannot be written, read or used; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    step: int
    state: PyTree
    data: dict[str, Any]  # {"next_index": step, "fingerprint": digest of the text}
    meta: dict[str, Any]


class Checkpointer:
    """Saves and restores the checkpoints of one work directory.

    Args:
        workdir: of the run; checkpoints live in its folder "checkpoints", one subfolder a step.
        keep_latest: newest checkpoints to keep, at least 1.
        keep_every: steps that are multiples of it are kept for ever; 0 = none.
        is_read_only: never change anything (evaluation of a run that may still be training).
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep_latest: int = 1,
        keep_every: int = 0,
        is_read_only: bool = False,
    ):
        if keep_latest < 1:
            raise ValueError(
                f"config.train.keep_latest must be at least 1: got {keep_latest}; a run needs its "
                "last checkpoint to resume"
            )
        self._workdir = pathlib.Path(workdir).absolute()
        self._folder = self._workdir / run_files.CHECKPOINTS
        self._is_read_only = is_read_only
        policies: list[policy.PreservationPolicy] = [policy.LatestN(keep_latest)]
        if keep_every:
            policies.append(policy.EveryNSteps(keep_every))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=None if is_read_only else policy.AnyPreservationPolicy(policies),
            create=not is_read_only,
            read_only=is_read_only,
            cleanup_tmp_directories=not is_read_only,
        )
        if is_read_only and not self._folder.is_dir():
            raise FileNotFoundError(
                f"a run keeps its checkpoints in {self._folder}: there is no such folder; "
                "check --workdir, or train first with scripts.train"
            )
        self._manager = ocp.CheckpointManager(self._folder, options=self._options)

    def steps(self) -> list[int]:
        """Returns the steps that have a finished checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(
        self, step: int, state: PyTree, config: dict[str, Any], *, fingerprint: str = ""
    ) -> None:
        """Starts saving; returns when the state may be overwritten.

        Args:
            step: updates done.
            state: a TrainState.
            config: the resolved config.
            fingerprint: of the text that the next steps read; "" = unknown.

        Raises:
            CheckpointError: if this or the save before failed; older checkpoints are intact.
        """
        arrays = _key_data(state)
        meta = {
            "format": FORMAT,
            "step": step,
            "config": config,
            "versions": {name: metadata.version(name) for name in VERSIONED_PACKAGES},
            "leaves": _describe(arrays, with_checksums=True),
        }
        self._require_space(step, arrays)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays),
                    data=ocp.args.JsonSave({"next_index": step, "fingerprint": fingerprint}),
                    meta=ocp.args.JsonSave(meta),
                ),
                force=True,
            )
        except Exception as error:
            raise self._save_failed(step, error) from error

    def wait(self) -> None:
        """Returns when every started save is on disk.

        Raises:
            CheckpointError: if one of them failed.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_failed(None, error) from error

    def close(self) -> None:
        """Waits for running saves and releases the folder."""
        self.wait()
        self._manager.close()

    def read_meta(self, step: int) -> dict[str, Any]:
        """Returns the description of a checkpoint.

        Raises:
            CheckpointError: if it cannot be read.
        """
        try:
            _require_small(self._folder / str(step) / "meta")
            restored = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
            return _checked_meta(restored["meta"])
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self._folder / str(step)} must be readable: its description is not "
                f"({_first_line(error)}); use another step: {self.steps()}"
            ) from error

    def restore(self, step: int, template: PyTree) -> Restored:
        """Returns a checkpoint with the structure, shapes and dtypes of `template`.

        Args:
            step: one of `steps()`.
            template: a TrainState or any subtree of one in the same positions (a dict with some of
                its fields restores those only); leaves need shape and dtype, and those that have a
                sharding are restored with it, others onto the default device.

        Raises:
            FileNotFoundError: no such step.
            ValueError: the checkpoint is of another model or optimizer.
            CheckpointError: damaged files.
        """
        if step not in self.steps():
            raise FileNotFoundError(
                f"step must be a checkpoint of {self._folder}: got {step}; there are {self.steps()}"
            )
        meta = self.read_meta(step)
        if meta["format"] != FORMAT:
            raise ValueError(
                f"a checkpoint must have format {FORMAT}: {self._folder / str(step)} has "
                f"{meta['format']}; use the version of longctx_jax that wrote it"
            )
        abstract = jax.eval_shape(_key_data, template)
        _require_same_leaves(meta, abstract, self._folder / str(step))
        args = ocp.checkpoint_utils.construct_restore_args(_placed(abstract, template))
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(abstract, restore_args=args, partial_restore=True),
                    data=ocp.args.JsonRestore(),
                ),
            )
            state = restored["state"]
            require_restored(state)
            _require_checksums(meta, state)
        except Exception as error:
            raise CheckpointError(
                f"checkpoint {self._folder / str(step)} is damaged: {_first_line(error)}; "
                f"use another step: {self.steps()}"
            ) from error
        return Restored(step, _wrap_keys(state, template), restored["data"], meta)

    def restore_latest(self, template: PyTree) -> Restored | None:
        """Returns the newest checkpoint that is whole, None if there is none at all.

        Damaged ones are reported loudly and, once an older one is restored, moved to
        "checkpoints_damaged" (not when read-only). If none can be restored, nothing is moved: the
        fault may be the machine's, and a second start must fail in the same way.

        Raises:
            ValueError: the checkpoint is of another model or optimizer.
            CheckpointError: there are checkpoints, and none can be restored.
        """
        steps = self.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            restored = None
            try:
                restored = self.restore(step, template)
            except CheckpointError as error:
                logging.error("falling back to the checkpoint before step %d: %s", step, error)
            if not _all_processes(restored is not None):
                damaged.append(step)
                continue
            assert restored is not None
            for bad in damaged:
                self._set_aside(bad)
            return restored
        if steps:
            raise CheckpointError(
                f"a run must have one whole checkpoint to continue: all of {steps} in "
                f"{self._folder} are damaged; restore them from a copy, or use a new --workdir"
            )
        return None

    def _set_aside(self, step: int) -> None:
        if self._is_read_only:
            return
        if jax.process_index() == 0:
            self._move_aside(step)
        _all_processes(True)  # nobody looks before it is gone
        self._manager.reload()

    def _move_aside(self, step: int) -> None:
        target = self._workdir / DAMAGED_FOLDER / f"{step}-{int(time.time())}"
        target.parent.mkdir(exist_ok=True)
        shutil.move(self._folder / str(step), target)

    def _require_space(self, step: int, arrays: PyTree) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)) + BYTES_BESIDE_ARRAYS
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise CheckpointError(
                f"saving step {step} needs up to {needed / 1e6:.1f} MB in {self._folder}: "
                f"{free / 1e6:.1f} MB are free; {self._intact()}; free some space and start the "
                "same command again"
            )

    def _save_failed(self, step: int | None, error: Exception) -> CheckpointError:
        what = "a checkpoint" if step is None else f"step {step}"
        return CheckpointError(
            f"saving {what} in {self._folder} must succeed: {_first_line(error)}; "
            f"{self._intact()}; check the disk and start the same command again"
        )

    def _intact(self) -> str:
        steps = sorted(int(p.name) for p in self._folder.iterdir() if p.name.isdecimal())
        return f"checkpoints {steps} are intact" if steps else "no checkpoint exists yet"


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """Whether anything was ever saved in a work directory."""
    folder = workdir / run_files.CHECKPOINTS
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def _require_small(folder: pathlib.Path) -> None:
    """Raises ValueError if a description is too large to be parsed."""
    for path in folder.iterdir():
        if path.stat().st_size > META_MAX_BYTES:
            raise ValueError(f"{path.name} must be at most {META_MAX_BYTES} bytes")


def _checked_meta(meta: Any) -> dict[str, Any]:
    """Returns a description; raises ValueError unless it is one of this file's."""
    fields = {"config": dict, "leaves": dict, "step": int, "format": int}
    if not all(isinstance(meta[name], kind) for name, kind in fields.items()):
        raise ValueError(f"its fields {list(fields)} must be there")
    if meta["format"] != FORMAT:
        return meta  # whoever restores it says what to do
    for name, leaf in meta["leaves"].items():
        kinds = zip(("shape", "dtype", "checksum"), (list, str, str), strict=True)
        if not all(isinstance(leaf[field], kind) for field, kind in kinds):
            raise ValueError(f"its leaf {name} must have shape, dtype and checksum")
    return meta


def require_restored(tree: PyTree) -> None:
    """Raises ValueError if a leaf is still a shape: Orbax leaves those for missing values."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    lost = [_name(path) for path, leaf in flat if isinstance(leaf, jax.ShapeDtypeStruct)]
    if lost:
        raise ValueError(f"checkpoint has no value for {len(lost)} leaves: {lost[:10]}")


def _name(path: Iterable[Any]) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_data(tree: PyTree) -> PyTree:
    """Random keys as their raw words, everything else unchanged."""
    return jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)


def _wrap_keys(arrays: PyTree, template: PyTree) -> PyTree:
    return jax.tree.map(
        lambda t, x: jax.random.wrap_key_data(x) if _is_key(t) else x, template, arrays
    )


def _placed(abstract: PyTree, template: PyTree) -> PyTree:
    """Shapes with the shardings of the template; where it has none, on the default device."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(shape, leaf):
        sharding = getattr(leaf, "sharding", None) or default
        if shape.shape != leaf.shape and isinstance(sharding, jax.sharding.NamedSharding):
            sharding = sharding.update(spec=jax.sharding.PartitionSpec())  # a key's words
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(placed, abstract, template)


def _all_processes(is_well: bool) -> bool:
    """Whether all is well on every process; all of them must ask."""
    if jax.process_count() == 1:
        return is_well
    return bool(np.all(multihost_utils.process_allgather(np.array(is_well, np.int32))))


def _describe(tree: PyTree, *, with_checksums: bool) -> dict[str, dict[str, Any]]:
    """Shape, dtype and (for real arrays) checksum of every leaf, by path."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    described = {
        _name(path): {"shape": list(leaf.shape), "dtype": str(leaf.dtype)} for path, leaf in flat
    }
    if with_checksums:
        sums = checksums([leaf for _, leaf in flat])
        for entry, value in zip(described.values(), sums, strict=True):
            entry["checksum"] = f"{value:016x}"  # JSON's readers differ on 64-bit numbers
    return described


def _require_same_leaves(meta: dict[str, Any], abstract: PyTree, where: pathlib.Path) -> None:
    saved, wanted = meta["leaves"], _describe(abstract, with_checksums=False)
    differences = [f"{name} is missing" for name in wanted if name not in saved]
    for name, entry in wanted.items():
        was = saved.get(name)
        if was and (was["shape"], was["dtype"]) != (entry["shape"], entry["dtype"]):
            differences.append(
                f"{name} is {was['dtype']}{was['shape']}, not {entry['dtype']}{entry['shape']}"
            )
    tops = {name.split("/")[0] for name in wanted}
    extra = [n for n in saved if n not in wanted and n.split("/")[0] in tops]
    differences += [f"{name} is not in this model" for name in extra]
    if differences:
        model = meta["config"].get("model")
        model = model.get("name") if isinstance(model, dict) else None
        shown = "; ".join(differences[:5])
        raise ValueError(
            f"a checkpoint must be of the same model and optimizer: {where} (model '{model}') "
            f"differs in {len(differences)} arrays: {shown}; use the config it was trained "
            "with, or another --workdir"
        )


def _require_checksums(meta: dict[str, Any], state: PyTree) -> None:
    for name, entry in _describe(state, with_checksums=True).items():
        if entry["checksum"] != meta["leaves"][name]["checksum"]:
            raise ValueError(f"the checksum of {name} is wrong")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
