"""Small comparison of mixers at equal parameters and tokens: minutes a run on two CPU cores.

4 layers x 128 (0.87 M parameters), 250 updates of 8 x 512 bytes, the cache carried along stripes.
The mixers and texts are varied by configs/sweeps/decay_quality.py.
"""

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config: retention on enwik8_4m."""
    config = base.get_config(arg)
    config.model.name = "decay"
    config.model.d_ff = 308
    config.model.n_layers = 4
    config.model.d_model = 128
    config.model.n_heads = 4
    config.model.tie_embeddings = False
    config.data.name = "enwik8_4m"
    config.data.seq_len = 512
    config.data.global_batch_size = 8
    config.optim.name = "muon"
    config.optim.learning_rate = 2e-2
    config.optim.schedule = "linear"
    config.optim.final_fraction = 0.0
    config.optim.warmup_steps = 25
    config.train.n_steps = 250
    config.train.checkpoint_every = 250
    config.eval.every = 125
    config.eval.max_bytes = 50_000
    config.eval.batch_size = 8
    return config
