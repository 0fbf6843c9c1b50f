"""Small comparison of staggered stacks at equal tokens: minutes a run on two CPU cores.

Two stacks of 6 layers x 96 on enwik8_4m, 200 updates of 8 x 512 bytes. What varies is in
configs/sweeps/stagformer_quality.py.
"""

import ml_collections

from configs import decay_quality


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = decay_quality.get_config(arg)
    config.model.name = "stagformer"
    config.model.n_layers = 12
    config.model.d_model = 96
    config.model.n_heads = 3
    config.model.d_ff = 264
    config.train.carry_cache = False
    config.train.n_steps = 200
    config.train.checkpoint_every = 200
    config.eval.every = 100
    return config
