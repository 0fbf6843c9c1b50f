"""Transformer-VQ on enwik8: transformer_small.py with its attention replaced, the rest equal.

Eight heads with 512 codewords each; keys, positions and gradients reach 512 tokens back, codes and
mean values stand for everything older.
"""

import ml_collections

from configs.enwik8 import transformer_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = transformer_small.get_config(arg)
    config.model.name = "transformer_vq"
    config.model.vq.codebook_size = 512
    config.model.vq.window_len = 512
    return config
