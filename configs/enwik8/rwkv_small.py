"""RWKV-6 on enwik8 (44 M parameters): transformer_small.py with both of its halves replaced."""

import ml_collections

from configs.enwik8 import transformer_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = transformer_small.get_config(arg)
    config.model.pattern = ("rwkv",)
    config.model.mlp = "rwkv"
    return config
