"""RMT on enwik8: transformer_small.py in segments of 512 bytes, memory tokens through all layers.

A row has 8 segments, and gradients go back through two of them, as in the paper's BPTT-2; rows grow
from two segments to eight. Segments run one after another: RMT has no diagonals.
"""

import ml_collections

from configs.enwik8 import armt_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = armt_small.get_config(arg)
    config.model.memory.kind = "rmt"
    config.model.memory.bptt_segments = 2
    config.model.schedule = "sequential"
    return config
