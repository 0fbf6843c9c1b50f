"""Transformer-VQ: softmax attention over vector-quantised keys in every layer, in linear time.

The published model is a stack of gated single-head units: config.model.vq.gate="silu", mlp="none",
n_heads=1, d_value=2 d_model (configs/enwik8/transformer_vq_190m.py). With the mixer's defaults it
is the baseline transformer with its attention replaced.

Source: Lingle (2023), arXiv 2309.16354.
"""

from longctx_jax.models.base import Decoder
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import KINDS


def build(config: ModelConfig) -> Decoder:
    """Returns the decoder whose pattern defaults to vector-quantised attention in every layer."""
    return Decoder(config.with_pattern(("vq",), KINDS))
