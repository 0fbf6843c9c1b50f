"""What checkpoints cost a run: the part "saves" of the suite `train`.

A stretch of updates with a save at its start takes turns with the same stretch without one. The
save is asynchronous, so its price is what the loop waits for it and what the writing threads take
from the updates meanwhile; the stretch ends when both the updates and the save are done.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from longctx_jax.accounting import flops
from longctx_jax.benchmarking import timing
from longctx_jax.benchmarking.model_cases import (
    Mixers,
    base_model,
    shape_fields,
    speed_fields,
    train_case,
)
from longctx_jax.benchmarking.ratios import quartiles
from longctx_jax.benchmarking.rows import Row, make
from longctx_jax.benchmarking.timing import Limits
from longctx_jax.benchmarking.train.parts import train_shape
from longctx_jax.models import build_model
from longctx_jax.models.config import model_config
from longctx_jax.nn.mixers import MIXERS
from longctx_jax.training.checkpoint import Checkpointer

N_UPDATES = 20  # of a stretch: a save must be over before they are, as it is in a run


def saves_part(config: Any, limits: Limits, mixers: Mixers = MIXERS) -> Iterator[Row]:
    """Yields one row: `overhead_fraction`, a save's price over the time of checkpoint_every steps.

    Args:
        config: a whole config; its model, optim, data.global_batch_size, data.seq_len,
            train.loss_chunk_len, train.checkpoint_every and train.keep_latest count.
        limits: how many turns.
    """
    whole = model_config(dict(config.model), mixers)
    model = build_model(base_model(config, limits, mixers) if limits.is_quick else whole)
    batch_size, seq_len = train_shape(config, limits)
    case = train_case(config, model, batch_size, seq_len)
    inputs = case.make_inputs(None)
    update, fields = timing.compiled(case.function, inputs)
    fields |= timing.memory_fields(update)
    state = update(*inputs)[0]
    n_updates = 2 if limits.is_quick else N_UPDATES

    def stretch(save: Callable[[Any], None]) -> float:
        """Returns the seconds of some updates, begun with `save`."""
        nonlocal state
        jax.block_until_ready(state)
        start = time.perf_counter()
        save(state)
        for _ in range(n_updates):
            state = update(state, inputs[1])[0]
        jax.block_until_ready(state)
        checkpointer.wait()
        return time.perf_counter() - start

    waits: list[float] = []

    def save(state) -> None:
        start = time.perf_counter()
        checkpointer.save(int(state.step), state, config.to_dict())
        waits.append(time.perf_counter() - start)

    plain, saving = [], []
    with tempfile.TemporaryDirectory() as folder:
        checkpointer = Checkpointer(folder, keep_latest=config.train.keep_latest, keep_every=0)
        with contextlib.closing(checkpointer):
            stretch(save)  # makes its folders and threads
            waits.clear()
            for _ in range(limits.n_runs):
                plain.append(stretch(lambda state: None))
                saving.append(stretch(save))
    extra_s = np.asarray(saving) - np.asarray(plain)
    step_s = float(np.median(plain)) / n_updates
    interval_s = config.train.checkpoint_every * step_s
    wait_s = float(np.median(waits))
    price_s = max(float(np.median(extra_s)), wait_s)  # the difference of two stretches may be noise
    speed = timing.summary([seconds / n_updates for seconds in plain])
    per_token = flops.train_flops_per_token(model.config, seq_len)
    extra = quartiles("save_extra", 1e3 * extra_s, digits=3)
    about = {"name": model.config.name, **shape_fields(model.config, batch_size, seq_len)}
    about["checkpoint_every"] = config.train.checkpoint_every
    costs = {
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "save_wait_ms": round(1e3 * wait_s, 3),
        **{f"{name}_ms": value for name, value in extra.items()},
        "overhead_fraction": round(price_s / interval_s, 6),
    }
    told = speed | speed_fields(speed, batch_size * seq_len, per_token)
    yield make(about, fields | told | costs)
