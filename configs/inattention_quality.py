"""Small comparison of InAttention with full attention: minutes a run on two CPU cores.

4 layers x 128 (0.87 M parameters) on pg19_mini, 250 updates of 8 x 512 bytes, windows that start
anew. What varies is in configs/sweeps/inattention_quality.py.
"""

import ml_collections

from configs import decay_quality


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = decay_quality.get_config(arg)
    config.model.name = "inattention"
    config.model.d_ff = 349
    config.data.name = "pg19_mini"
    config.train.carry_cache = False
    return config
