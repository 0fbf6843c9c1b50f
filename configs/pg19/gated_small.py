"""Gated retention on PG-19 as bytes: decay_small.py with a decay a token and head."""

import ml_collections

from configs.pg19 import decay_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = decay_small.get_config(arg)
    config.model.decay.kind = "gated"
    return config
