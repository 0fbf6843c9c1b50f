"""Full attention on enwik8, 12 layers x 512 (38 M parameters), 512-token windows.

The cache is carried from window to window. The baseline of the small enwik8 comparisons: sizes,
data order and optimizer are those of decay_small.py.
"""

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = base.get_config(arg)
    config.model.name = "transformer"
    config.model.n_layers = 12
    config.model.d_model = 512
    config.model.n_heads = 8
    config.model.dropout = 0.1
    config.model.embed_dropout = 0.1
    config.model.dtype = "bfloat16"
    config.data.name = "enwik8"
    config.data.seq_len = 512
    config.data.global_batch_size = 32
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 1_000
    config.train.n_steps = 50_000
    config.train.checkpoint_every = 1_000
    config.eval.every = 5_000
    config.eval.max_bytes = 1_000_000
    config.eval.batch_size = 32
    return config
