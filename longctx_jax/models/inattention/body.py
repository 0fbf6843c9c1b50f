"""The family of InAttention, as the decoder knows it."""

from longctx_jax.models.body import Body
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.inattention.layers import apply_initial, init_initial, init_memory


def prepare(config: ModelConfig) -> ModelConfig:
    """Returns the config with its pattern, which has no choice.

    Raises:
        ValueError: if fields contradict.
    """
    config = config.with_pattern(("inattention",), ("inattention",))
    if config.mlp == "rwkv":
        raise ValueError(
            "config.model.mlp='rwkv' reads what the token before became, and inattention keeps no "
            "such thing: got mlp='rwkv'; use swiglu, gelu or relu2"
        )
    if config.schedule != "layerwise":
        raise ValueError(
            "config.model.schedule must be 'layerwise' with inattention, whose layers have no "
            f"order among segments to choose: got {config.schedule!r}; leave it"
        )
    if config.sequence_axis:
        raise ValueError(
            "config.model.sequence_axis does not fit inattention, whose layers hand nothing from "
            f"segment to segment: got {config.sequence_axis!r}; spread rows (config.mesh.data) or "
            "heads (config.mesh.model)"
        )
    own = config.inattention
    if own.memory_position == "sinusoid" and config.d_model % 2:
        raise ValueError(
            "config.model.d_model must be even with inattention.memory_position='sinusoid': got "
            f"{config.d_model}; use {config.d_model + 1}, or memory_position='none'"
        )
    if own.score_position == "rotary" and config.d_key % 2:
        raise ValueError(
            "config.model.d_key must be even with inattention.score_position='rotary': got "
            f"{config.d_key}; use {config.d_key + 1}, or another score_position"
        )
    return config


BODY = Body(
    prepare=prepare,
    init=init_initial,
    init_cache=init_memory,
    apply=apply_initial,
    picks_outputs=True,
)
