"""How a run starts: the checks of its config and its folder, and the weights it takes over."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
from absl import logging

from longctx_jax import json_files, run_files
from longctx_jax.models import build_model
from longctx_jax.models.config import default_of_mixer
from longctx_jax.models.decoder import Decoder
from longctx_jax.training.checkpoint import Checkpointer, CheckpointError, has_checkpoints
from longctx_jax.training.curriculum import check_curriculum
from longctx_jax.training.inputs import Inputs, read_inputs
from longctx_jax.training.state import TrainState

CONFIG_MAX_BYTES = 1_000_000  # one of a run has about 5,000
# Fields that may change when a run is started again: they do not touch the state.
FREE_FIELDS = (
    "train.n_steps",
    "train.checkpoint_every",
    "train.keep_latest",
    "train.keep_every",
    "train.profile_start",
    "train.profile_steps",
    "data.data_dir",
    "data.download",
    "data.n_workers",
    "eval.",
    "log.",
    "mesh.",
)


def resolved(config: Any) -> dict[str, Any]:
    """Returns the config as its JSON file holds it: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def require_same_config(workdir: pathlib.Path, config: Any) -> None:
    """Checks that the folder's run, if it has saved anything, has the same config.

    Raises:
        ValueError: if it differs in a field that touches the state; names the fields.
    """
    path = workdir / run_files.CONFIG
    if path.exists() and has_checkpoints(workdir):
        before = _flatten(read_config(path))
        now = _flatten(resolved(config))
        changed = {
            name: (before.get(name), now.get(name))
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and not _is_new_and_usual(name, before, now)
        }
        fixed = {n: v for n, v in changed.items() if not n.startswith(FREE_FIELDS)}
        if fixed:
            shown = ", ".join(f"config.{n}: {a!r} there, {b!r} here" for n, (a, b) in fixed.items())
            raise ValueError(
                f"a work directory belongs to one config: {workdir} has another one ({shown}); use "
                "a new --workdir (config.train.init_from takes weights over), or the old values"
            )
        for name, (was, value) in changed.items():
            logging.warning("config.%s was %r and is %r from here on", name, was, value)


def _is_new_and_usual(name: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a field is one that earlier versions lack, and means what they did.

    It is off (0, "", ()), or of a mixer and at its default.
    """
    if name in before:
        return False
    group, _, rest = name.partition(".")
    kind, _, field = rest.partition(".")
    usual = default_of_mixer(kind, field) if group == "model" else None
    return not now[name] if usual is None else now[name] == usual


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """Returns the config of a run as its file holds it.

    Raises:
        ValueError: if the file holds something else.
    """
    remedy = "restore it from a copy, or use another run"
    config = json_files.read_object(path, remedy=remedy, max_bytes=CONFIG_MAX_BYTES)
    model, train = config.get("model"), config.get("train")
    ema_decay = train.get("ema_decay") if isinstance(train, dict) else None
    if not (isinstance(model, dict) and isinstance(ema_decay, int | float)):
        raise ValueError(
            f"{path} must be the config of a run: it lacks model or train.ema_decay; {remedy}"
        )
    return run_files.without_retired(config)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def with_weights_of(
    workdir: str, model: Decoder, state: TrainState, inputs: Inputs | None = None
) -> TrainState:
    """Returns the state with another run's newest weights, averaged ones where it keeps them.

    A model with recurrent memory also takes those of a run without: its memory starts fresh.

    Raises:
        FileNotFoundError: no run.
        ValueError: a run of another model, or of another tokenizer than that of `inputs`.
    """
    path = pathlib.Path(workdir) / run_files.CONFIG
    if not (path.is_file() and has_checkpoints(pathlib.Path(workdir))):
        raise FileNotFoundError(
            f"config.train.init_from must be the folder of a run with a checkpoint: {workdir} has "
            "none; name another folder, or train that run first"
        )
    given, theirs = read_config(path), read_inputs(pathlib.Path(workdir))
    if inputs is not None and theirs is not None and inputs.tokenizer != theirs.tokenizer:
        raise ValueError(
            f"config.train.init_from must be a run with the same tokenizer: {workdir} has one with "
            f"digest {theirs.tokenizer[:16]!r}, and config.data.tokenizer is one with "
            f"{inputs.tokenizer[:16]!r}; set it to the copy in "
            f"{pathlib.Path(workdir) / run_files.TOKENIZER}"
        )
    field = "ema" if given["train"]["ema_decay"] > 0 else "params"
    variables = {"params": state.params, "model_state": state.model_state}
    backbone = None
    other = build_model(given["model"], model.config.mixers)
    if model.backbone is not None and other.backbone is None:
        backbone = jax.eval_shape(model.backbone.init, jax.random.key(0))
    wanted = variables if backbone is None else backbone
    template = {field: wanted["params"], "model_state": wanted["model_state"]}
    try:
        restored = Checkpointer(workdir, is_read_only=True).restore_latest(template)
    except (ValueError, CheckpointError) as error:
        raise ValueError(
            f"config.train.init_from must be a whole run of the same model: {workdir}: {error}"
        ) from error
    assert restored is not None
    logging.info("weights=%s from=%s step=%d", field, workdir, restored.step)
    taken = {"params": restored.state[field], "model_state": restored.state["model_state"]}
    if backbone is not None:
        taken = model.add_to_backbone(variables, taken)
    ema = jax.tree.map(lambda x: x.copy(), taken["params"]) if state.ema else {}
    return dataclasses.replace(state, ema=ema, **taken)


def carried_cache_len(config: Any) -> int:
    """Returns the tokens that attention keeps from window to window; 0 = nothing is carried."""
    if not config.train.carry_cache or config.data.order != "stripes":
        return 0
    return config.train.cache_len or config.data.seq_len


def check_config(config: Any) -> None:
    """Raises ValueError on settings of the run that are impossible, naming the field."""
    for field in ("n_steps", "checkpoint_every", "n_microbatches"):
        if config.train[field] < 1:
            raise ValueError(
                f"config.train.{field} must be at least 1: got {config.train[field]}; set it higher"
            )
    if config.train.loss_positions < 0:
        raise ValueError(
            "config.train.loss_positions must not be negative: got "
            f"{config.train.loss_positions}; 0 is all tokens"
        )
    if config.train.cold_start_every < 0:
        raise ValueError(
            "config.train.cold_start_every must not be negative: got "
            f"{config.train.cold_start_every}; 0 is never"
        )
    check_curriculum(config)
    if config.log.every < 1:
        raise ValueError(f"config.log.every must be at least 1: got {config.log.every}; use 20")
    batch, micro = config.data.global_batch_size, config.train.n_microbatches
    if batch % micro:
        raise ValueError(
            f"config.train.n_microbatches must divide config.data.global_batch_size: got {micro} "
            f"and {batch}; choose a divisor"
        )
    if config.eval.batch_size < 1:
        raise ValueError(
            f"config.eval.batch_size must be at least 1: got {config.eval.batch_size}; use 8"
        )
    for field in ("every", "max_bytes", "seq_len", "cache_len"):
        if config.eval[field] < 0:
            raise ValueError(
                f"config.eval.{field} must not be negative: got {config.eval[field]}; 0 is the "
                "default"
            )
    if not 0.0 <= config.train.ema_decay < 1.0:
        raise ValueError(
            f"config.train.ema_decay must be in [0, 1): got {config.train.ema_decay}; 0 is off"
        )
