"""Transformer-VQ on PG-19 as bytes, 12 layers x 512, 2048-token windows with a carried cache."""

import ml_collections

from configs.enwik8 import transformer_vq_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = transformer_vq_small.get_config(arg)
    config.data.name = "pg19"
    config.data.seq_len = 2_048
    config.data.global_batch_size = 16
    config.model.dropout = 0.0
    config.model.embed_dropout = 0.0
    config.train.n_steps = 100_000
    return config
