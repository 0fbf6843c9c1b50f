"""Decaying linear attention on enwik8: transformer_small.py with another mixer."""

import ml_collections

from configs.enwik8 import transformer_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = transformer_small.get_config(arg)
    config.model.name = "decay"
    return config
