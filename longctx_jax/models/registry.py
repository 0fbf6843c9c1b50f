"""From `config.model.name` to a `Decoder`. The only place that knows all models."""

from typing import Any

from longctx_jax.models import (
    decay,
    inattention,
    recurrent_memory,
    stagformer,
    transformer,
    transformer_vq,
)
from longctx_jax.models.base import Decoder
from longctx_jax.models.config import model_config
from longctx_jax.models.config_checks import require_one_of

MODELS = {
    "transformer": transformer.build,
    "transformer_vq": transformer_vq.build,
    "decay": decay.build,
    "recurrent_memory": recurrent_memory.build,
    "stagformer": stagformer.build,
    "inattention": inattention.build,
}


def build_model(config: Any) -> Decoder:
    """Returns the model that `config.model` describes.

    Args:
        config: `config.model` as a ConfigDict, any mapping of its fields, or a ModelConfig.

    Raises:
        ValueError: unknown name or field, or contradictory sizes; names the field and the remedy.
    """
    config = model_config(config)
    require_one_of("name", config.name, tuple(MODELS))
    return MODELS[config.name](config)
