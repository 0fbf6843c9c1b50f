"""A byte model of Python source: about four minutes on two CPU cores, below 2 bits per byte.

Decaying linear attention with a short convolution (which sees the last four bytes from the first
step on), trained by Muon on windows drawn from all over the text: a short run needs variety more
than it needs context longer than its window.
"""

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the quickstart config."""
    config = base.get_config(arg)
    config.model.name = "decay"
    config.model.n_layers = 4
    config.model.d_model = 128
    config.model.n_heads = 4
    config.model.tie_embeddings = False
    config.model.decay.chunk_len = 32
    config.model.decay.conv_len = 4
    config.data.name = "python_source"
    config.data.order = "shuffled"
    config.data.seq_len = 128
    config.data.global_batch_size = 16
    config.optim.name = "muon"
    config.optim.learning_rate = 2e-2
    config.optim.schedule = "linear"
    config.optim.final_fraction = 0.0
    config.optim.warmup_steps = 50
    config.train.n_steps = 560
    config.train.checkpoint_every = 280
    config.eval.every = 140
    config.eval.max_bytes = 100_000
    config.eval.batch_size = 16
    config.eval.seq_len = 512
    return config
