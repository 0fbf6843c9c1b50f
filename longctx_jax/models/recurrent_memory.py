"""Recurrent memory: segments of exact attention, and a memory of constant size between them.

`memory.kind`: "armt" (an associative matrix a layer), "layerwise" (memory tokens a layer) or "rmt"
(memory tokens through the whole model).

Source: Bulatov et al. (2022), arXiv 2207.06881 (RMT); Rodkin et al. (2024), arXiv 2407.04841 (ARMT
and layer-wise tokens); Sivtsov et al. (2025), arXiv 2506.05229 (the family, and its schedule).
"""

from longctx_jax.models.base import Decoder
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import KINDS, MIXERS


def build(config: ModelConfig) -> Decoder:
    """Returns the decoder; by default all layers are softmax attention with memory."""
    if config.recurrence == "armt":
        return Decoder(config.with_pattern(("armt",), KINDS))
    return Decoder(config.with_pattern((config.memory.mixer,), tuple(MIXERS)))
