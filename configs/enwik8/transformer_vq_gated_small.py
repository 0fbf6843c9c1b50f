"""Transformer-VQ on enwik8 as a stack of gated single-head units, 24 x 512 (42 M parameters)."""

import ml_collections

from configs.enwik8 import transformer_vq_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = transformer_vq_small.get_config(arg)
    config.model.n_layers = 24
    config.model.n_heads = 1
    config.model.d_key = 128
    config.model.d_value = 1_024
    config.model.mlp = "none"
    config.model.vq.gate = "silu"
    return config
