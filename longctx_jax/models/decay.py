"""Decaying linear attention in every layer: constant memory, linear time (RetNet, Lightning)."""

from longctx_jax.models.base import Decoder
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import KINDS


def build(config: ModelConfig) -> Decoder:
    """Returns the decoder whose pattern defaults to decay attention in every layer."""
    return Decoder(config.with_pattern(("decay",), KINDS))
