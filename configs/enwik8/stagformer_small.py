"""StagFormer on enwik8: transformer_small.py as two stacks of six layers, one token apart.

Cross-attention adds 6.3 M parameters. Variants: --config.model.stagformer.share_weights=True (half
of the layers' parameters), --config.model.stagformer.cross_window=128 (or 1).
"""

import ml_collections

from configs.enwik8 import transformer_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = transformer_small.get_config(arg)
    config.model.name = "stagformer"
    config.model.stagformer.n_stacks = 2
    return config
