"""InAttention on PG-19 as bytes: as on enwik8, with longer biases and without dropout."""

import ml_collections

from configs.enwik8 import inattention_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = inattention_small.get_config(arg)
    config.data.name = "pg19"
    config.model.dropout = 0.0
    config.model.embed_dropout = 0.0
    config.model.inattention.max_distance = 16_384  # books are read at longer contexts
    config.train.n_steps = 100_000
    return config
