"""Small comparison of attention over quantised keys: minutes a run on two CPU cores.

The sizes, texts and optimizer of configs/decay_quality.py: 4 layers x 128 (0.87 M parameters), 150
updates of 8 x 512 bytes. Varied by configs/sweeps/vq_quality.py.
"""

import ml_collections

from configs import decay_quality


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config: MHA with 256 codewords a head on enwik8_4m."""
    config = decay_quality.get_config(arg)
    config.model.name = "transformer_vq"
    config.model.vq.codebook_size = 256
    config.model.vq.window_len = 128
    config.model.vq.codebook_decay = 0.9  # 150 updates are few
    config.model.vq.reseed_below = 1.0
    config.train.n_steps = 150
    config.train.checkpoint_every = 150
    config.eval.every = 75
    return config
