"""Gated retention with a 512-token sliding window in every third layer, on PG-19 as bytes."""

import ml_collections

from configs.pg19 import gated_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = gated_small.get_config(arg)
    config.model.pattern = ("decay", "decay", "sliding")
    config.model.sliding.window_len = 512
    return config
