"""Learning-rate schedules, weight-decay masks and the optax chain that `config.optim` describes."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax import contrib

from longctx_jax.typing import PyTree

SCHEDULES = ("cosine", "linear", "constant", "wsd")
OPTIMIZERS = ("adamw", "adam", "lion", "adafactor", "muon", "sgd")
# Leaves that weight decay and orthogonalised updates act on: matrices applied to activations.
MATRICES = ("kernel",)


def make_schedule(config: Any, n_steps: int) -> optax.Schedule:
    """Returns step -> learning rate: linear warm-up, then what config.optim.schedule names.

    "cosine" and "linear" fall to final_fraction of the peak at n_steps; "wsd" stays at the peak and
    falls linearly over the last decay_fraction of the steps; "constant" stays.

    Raises:
        ValueError: unknown schedule, or fractions and step counts out of range.
    """
    if config.schedule not in SCHEDULES:
        raise ValueError(
            f"config.optim.schedule must be one of {list(SCHEDULES)}: got {config.schedule!r}; "
            "choose one of them"
        )
    for field in ("final_fraction", "decay_fraction"):
        if not 0.0 <= config[field] <= 1.0:
            raise ValueError(
                f"config.optim.{field} must be in [0, 1]: got {config[field]}; it is a fraction"
            )
    if config.warmup_steps < 0:
        raise ValueError(
            f"config.optim.warmup_steps must not be negative: got {config.warmup_steps}; 0 is off"
        )
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, n_steps)
    rest = max(1, n_steps - warmup)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "wsd":
        n_decay = min(rest, max(1, round(config.decay_fraction * n_steps)))
        after = optax.linear_schedule(peak, final, n_decay, max(0, rest - n_decay))
    else:
        after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    # Step 0 already moves: (step + 1) / warmup of the peak.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(config: Any, n_steps: int) -> tuple[optax.GradientTransformation, Callable]:
    """Returns the optax transformation of `config.optim`, and its schedule for logging.

    Weight decay is decoupled and applies to matrices only; "adam" is the one without it. It is
    multiplied by the learning rate, unless config.optim.decay_times_rate is off: then every step
    takes weight_decay of each weight, as several papers have it.
    "muon" orthogonalises the update of every layer's matrices (scaled by 0.2 sqrt(max side), so
    Adam's learning rates carry over) and leaves the rest to Adam.

    Raises:
        ValueError: unknown optimizer, or a negative learning rate.
    """
    if config.name not in OPTIMIZERS:
        raise ValueError(
            f"config.optim.name must be one of {list(OPTIMIZERS)}: got {config.name!r}; "
            "choose one of them"
        )
    if not config.learning_rate >= 0:
        raise ValueError(
            f"config.optim.learning_rate must not be negative: got {config.learning_rate}; "
            "use something like 1e-3"
        )
    schedule = make_schedule(config, n_steps)
    rate = config.weight_decay if config.decay_times_rate else 0.0
    decay = {"weight_decay": rate, "mask": is_matrix}
    betas = {"b1": config.beta1, "b2": config.beta2}
    if config.name == "adamw":
        core = optax.adamw(schedule, **betas, eps=config.eps, **decay)
    elif config.name == "adam":
        core = optax.adam(schedule, **betas, eps=config.eps)
    elif config.name == "lion":
        core = optax.lion(schedule, **betas, **decay)
    elif config.name == "adafactor":
        core = optax.adafactor(
            schedule,
            multiply_by_parameter_scale=config.parameter_scale,
        )
        core = optax.chain(core, _decoupled_decay(rate, schedule))
    elif config.name == "muon":
        core = contrib.muon(
            schedule,
            beta=0.95,
            eps=config.eps,
            weight_decay=rate,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_muon_dimensions,
        )
    else:
        sgd = optax.sgd(schedule, momentum=config.beta1)
        core = optax.chain(sgd, _decoupled_decay(rate, schedule))
    if not config.decay_times_rate and config.name != "adam":
        core = optax.chain(core, _decoupled_decay(config.weight_decay, 1.0))
    if config.clip_norm > 0:
        core = optax.chain(optax.clip_by_global_norm(config.clip_norm), core)
    return core, schedule


def _decoupled_decay(rate: float, schedule: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Adds -rate * learning rate * weight to the update of every matrix."""
    decay = optax.chain(
        optax.scale(0.0), optax.add_decayed_weights(rate), optax.scale_by_learning_rate(schedule)
    )

    def update(updates, state, params=None):
        shrink, state = decay.update(updates, state, params)
        wanted = is_matrix(params)
        updates = jax.tree.map(lambda u, s, m: u + s if m else u, updates, shrink, wanted)
        return updates, state

    return optax.GradientTransformation(decay.init, update)


def is_matrix(params: PyTree) -> PyTree:
    """Returns True for every leaf that is a stacked matrix [layers, in, out]."""

    def matches(path, leaf):
        del leaf
        return str(getattr(path[-1], "key", "")) in MATRICES

    return jax.tree_util.tree_map_with_path(matches, params)


def _muon_dimensions(params: PyTree) -> PyTree:
    """Which axes of each leaf form a matrix, the last two; None = not one, left to Adam.

    Axes before them count layers, and stacks of layers.
    """

    def dimensions(matrix, leaf):
        axes = {"reduction_axis": (leaf.ndim - 2,), "output_axis": (leaf.ndim - 1,)}
        return contrib.MuonDimensionNumbers(**axes) if matrix else None

    return jax.tree.map(dimensions, is_matrix(params), params)
