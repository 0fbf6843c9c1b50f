"""A run's model trained on for longer contexts: --config=configs/longer_context.py:RUN_FOLDER.

Everything as in the run, its weights to start from, rows of 8,192 tokens (never fewer than before)
and a tenth of its learning rate; with inattention the loss of 1,024 tokens a row, drawn anew each
update, since only these cost. For rotary positions add --config.model.softmax.rope_scaling=linear
(or yarn) and rope_factor = new / old length: the scaling is part of the model, the weights are the
same.
"""

import ml_collections

from configs import from_run

CONTEXT_LEN = 8_192  # tokens


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the run in the folder `arg` with longer rows."""
    config = from_run.get_config(arg)
    tokens = config.data.seq_len * config.data.global_batch_size
    config.data.seq_len = max(CONTEXT_LEN, config.data.seq_len)
    config.data.global_batch_size = max(1, tokens // config.data.seq_len)
    config.train.carry_cache = False
    config.train.n_steps = 100
    config.train.checkpoint_every = 100
    config.train.n_microbatches = 1
    config.eval.every = 0
    config.eval.batch_size = 1
    config.eval.seq_len = 0
    config.optim.learning_rate *= 0.1
    config.optim.warmup_steps = 10
    if config.model.name == "inattention":
        config.train.loss_positions = 1_024
    return config
