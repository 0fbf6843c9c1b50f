"""A number hidden in the text of books, recalled by ARMT over eight segments of 128 bytes.

The model of associative_armt.py, wider. Rows are long for a CPU: start with fewer segments
(config.data.seq_len), and go on with config.train.init_from. Sizes and rates are untried.
"""

import ml_collections

from configs.recall import associative_armt


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = associative_armt.get_config(arg)
    config.model.n_layers = 4
    config.model.d_model = 128
    config.model.n_heads = 4
    config.model.memory.segment_len = 128
    config.model.memory.n_memory_tokens = 8
    config.model.memory.d_memory = 64
    config.data.name = "recall_passkey"
    config.data.recall.segment_len = 128
    config.data.recall.n_questions = 1
    config.data.recall.n_digits = 5
    config.data.seq_len = 128 * 9
    config.data.global_batch_size = 32
    config.optim.learning_rate = 1e-2
    config.train.n_steps = 10_000
    config.train.checkpoint_every = 1_000
    config.eval.every = 500
    return config
