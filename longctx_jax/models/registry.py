"""From `config.model` to a `Decoder`."""

from collections.abc import Mapping
from typing import Any

from longctx_jax.models.config import model_config
from longctx_jax.models.decoder import Decoder
from longctx_jax.models.families import NAMES, body_of
from longctx_jax.models.stack import make_blocks
from longctx_jax.nn.config_checks import require_one_of
from longctx_jax.nn.contract import Mixer
from longctx_jax.nn.mixers import MIXERS


def build_model(config: Any, mixers: Mapping[str, Mixer] = MIXERS) -> Decoder:
    """Returns the model that `config.model` describes.

    Args:
        config: `config.model` as a ConfigDict, any mapping of its fields, or a ModelConfig.
        mixers: what the words of its pattern mean, `{**MIXERS, "mine": MIXER}` with one of your
            own, whose fields are `config.model.mine`. A ModelConfig keeps those it was made with.

    Raises:
        ValueError: unknown name or field, or contradictory sizes; names the field and the remedy.
    """
    config = model_config(config, mixers)
    require_one_of("name", config.name, NAMES)
    config = body_of(config).prepare(config)
    if config.name != "inattention":
        make_blocks(config)  # mixers check their fields against the sizes
    return Decoder(config)
