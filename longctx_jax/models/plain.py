"""Layers one after another: the full-attention baseline, and every pattern of mixers.

    h <- E[token];   per layer:  h += mixer(norm h),  h += MLP(norm h);   logits = norm(h) W

Source: Vaswani et al. (2017), arXiv 1706.03762; Touvron et al. (2023), arXiv 2302.13971, for
RMSNorm, SwiGLU and rotary positions in the baseline.
"""

from longctx_jax.models import stack
from longctx_jax.models.body import Body
from longctx_jax.models.config import ModelConfig

DEFAULTS = {"transformer": "softmax", "transformer_vq": "vq", "decay": "decay"}  # name -> mixer


def prepare(config: ModelConfig) -> ModelConfig:
    """Returns the config whose pattern defaults to the model's mixer in every layer."""
    return config.with_pattern((DEFAULTS[config.name],))


def init(config: ModelConfig, key):
    """Returns parameters {"stack"} and non-gradient state."""
    params, state = stack.init_stack(config, key)
    return {"stack": params}, state


def init_cache(config: ModelConfig, batch_size: int, max_len: int):
    """Returns the caches of the layers; nothing else goes from call to call."""
    return stack.init_stack_cache(config, batch_size, max_len), ()


def apply(config: ModelConfig, params, state, x, documents, cache, *, norm, key, train):
    """Runs the stack; see `Body`."""
    layers = None if cache is None else cache[0]
    x, layers, aux = stack.apply_stack(
        config, params["stack"], state, x, documents, layers, key=key, train=train
    )
    return norm(x), None if layers is None else (layers, ()), aux


BODY = Body(
    prepare=prepare,
    init=init,
    init_cache=init_cache,
    apply=apply,
    update_state=stack.update_stack_state,
    describe_state=stack.describe_stack_state,
)
