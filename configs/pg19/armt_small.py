"""ARMT on PG-19 as bytes: configs/enwik8/armt_small.py with segments of 1,024 bytes."""

import ml_collections

from configs.enwik8 import armt_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = armt_small.get_config(arg)
    config.data.name = "pg19"
    config.model.dropout = 0.0
    config.model.embed_dropout = 0.0
    config.model.memory.segment_len = 1_024
    config.data.seq_len = 8_192
    config.train.n_steps = 100_000
    config.train.curriculum_starts = (0, 40_000, 60_000)
    config.train.curriculum_lens = (2_048, 4_096, 8_192)
    return config
