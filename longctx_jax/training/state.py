"""`TrainState`: everything a run needs to continue bit for bit, as one pytree."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from longctx_jax.models.decoder import Decoder
from longctx_jax.typing import PRNGKey, PyTree


@flax.struct.dataclass
class TrainState:
    """The state of a run after `step` updates; checkpoints hold exactly this."""

    step: jax.Array  # int32, updates done
    params: PyTree
    opt_state: PyTree
    ema: PyTree  # exponential average of params; {} when off
    model_state: PyTree  # non-gradient state, updated from aux.statistics
    cache: Any  # model cache carried from window to window; {} when off
    key: PRNGKey  # of dropout; folded with the step, never split

    @property
    def variables(self) -> dict[str, PyTree]:
        """What the model is applied with in training."""
        return {"params": self.params, "model_state": self.model_state}

    @property
    def eval_variables(self) -> dict[str, PyTree]:
        """What the model is evaluated with: the average of the weights where there is one."""
        return {"params": self.ema or self.params, "model_state": self.model_state}


def init_state(
    model: Decoder,
    tx: optax.GradientTransformation,
    *,
    seed: int,
    batch_size: int,
    cache_len: int,
    use_ema: bool,
) -> TrainState:
    """Returns the state before the first update.

    Args:
        batch_size: rows of a step, for the carried cache.
        cache_len: tokens full attention looks back on across windows; 0 = no carried cache.
        use_ema: keep an average of the weights, starting at their initial values.
    """
    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=jax.jit(tx.init)(params),
        ema=jax.tree.map(jnp.copy, params) if use_ema else {},
        model_state=variables["model_state"],
        cache=model.init_cache(batch_size, cache_len) if cache_len else {},
        key=dropout_key,
    )
