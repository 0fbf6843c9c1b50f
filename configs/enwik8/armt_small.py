"""ARMT on enwik8: transformer_small.py in segments of 512 bytes with a memory between them.

A row has 8 segments; gradients go back through all of them. Rows grow from two segments to
eight (of one segment, a row would teach the memory nothing). To start from a trained transformer,
name its work directory in config.train.init_from: the memory then starts without effect. The
memory is a plain delta rule instead of the published weighted means, which can overflow
(docs/memory.md).
"""

import ml_collections

from configs.enwik8 import transformer_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = transformer_small.get_config(arg)
    config.model.name = "recurrent_memory"
    config.model.memory.segment_len = 512
    config.model.memory.n_memory_tokens = 16
    config.model.memory.use_denominator = False
    config.model.memory.normalize = True
    config.model.remat = "full"
    config.data.seq_len = 4_096
    config.data.global_batch_size = 4
    config.train.carry_cache = False
    config.train.curriculum_starts = (0, 20_000, 30_000)
    config.train.curriculum_lens = (1_024, 2_048, 4_096)
    return config
