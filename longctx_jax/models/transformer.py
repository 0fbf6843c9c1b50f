"""The full-attention baseline: pre-norm blocks of softmax attention.

Source: Vaswani et al. (2017); Touvron et al. (2023) for RMSNorm, SwiGLU and rotary positions. With
`config.model.pattern` any mixture of mixers.
"""

from longctx_jax.models.base import Decoder
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import KINDS


def build(config: ModelConfig) -> Decoder:
    """Returns the decoder whose pattern defaults to softmax attention in every layer."""
    return Decoder(config.with_pattern(("softmax",), KINDS))
