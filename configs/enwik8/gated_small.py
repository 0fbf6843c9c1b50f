"""Gated retention on enwik8: decay_small.py with a decay that depends on token and head."""

import ml_collections

from configs.enwik8 import decay_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = decay_small.get_config(arg)
    config.model.decay.kind = "gated"
    return config
