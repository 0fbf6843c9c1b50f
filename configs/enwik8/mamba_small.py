"""Mamba-2 on enwik8: transformer_small.py with 24 blocks of one half in place of 12 of two."""

import ml_collections

from configs.enwik8 import transformer_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = transformer_small.get_config(arg)
    config.model.pattern = ("mamba",)
    config.model.n_layers = 24
    config.model.mlp = "none"
    return config
