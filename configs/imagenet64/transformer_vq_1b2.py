"""Transformer-VQ on ImageNet64 as published: 48 gated units x 2048, 1.2 G parameters.

An image is 12,288 bytes (row, column, colour), read in windows of 1,536 with the cache carried and
reset at every image. Published: 3.16 bits per byte on the official validation set (`--split=test`),
after 500,000 updates of 128 x 1536 bytes. Differences from the published code as in
configs/enwik8/transformer_vq_190m.py and configs/pg19/transformer_vq_1b3.py; there are no absolute
positions (as in the paper's speed configuration).

Source: Lingle (2023), arXiv 2309.16354, and the scripts of its code.
"""

import ml_collections

from configs.pg19 import transformer_vq_1b3


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = transformer_vq_1b3.get_config(arg)
    config.model.vocab_size = 257  # 256 values, and the token that starts an image
    config.model.dropout = 0.0
    config.model.layer_drop = 0.0
    config.data.name = "imagenet64"
    config.data.tokenizer = "delimited_bytes"
    config.data.seq_len = 1_536
    config.train.cold_start_every = 0  # every image does
    return config
