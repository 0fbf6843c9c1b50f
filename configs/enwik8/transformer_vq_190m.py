"""Transformer-VQ on enwik8 as published: 48 gated units x 768, 188 M parameters with codebooks.

Published: 0.99 bits per byte on the test split, after 125,000 updates of 128 x 2048 bytes. Where
this differs from the published code:

- 256 symbols instead of 259; norms have a gain and no bias; there is a norm before the output
  matrix, which has no bias; weight decay acts on the matrices of the units alone;
- what a unit adds starts smaller by the square root of the depth; embeddings are stored smaller by
  sqrt(768), and multiplied by that, so that the optimizer moves them faster;
- the sequences of 8192 bytes, each begun with an empty cache, follow one another in 128 stripes of
  the text, where theirs come in shuffled order; masks of dropped sinusoids and units are drawn
  anew every update;
- a key's gradient comes from the queries at most 512 tokens later, where theirs comes from its own
  and the next block of 512.

Source: Lingle (2023), arXiv 2309.16354, and the scripts of its code.
"""

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = base.get_config(arg)
    model = config.model
    model.name = "transformer_vq"
    model.n_layers = 48
    model.d_model = 768
    model.n_heads = 1
    model.d_key = 128
    model.d_value = 1_536
    model.mlp = "none"
    model.vq.gate = "silu"
    model.vq.codebook_size = 512
    model.vq.window_len = 512
    model.vq.block_len = 512
    model.vq.codebook_start = "published"
    model.vq.position_dropout = 0.2
    model.dropout = 0.5
    model.layer_drop = 0.3
    model.tie_embeddings = False
    model.dtype = "bfloat16"
    model.remat = "full"
    config.data.name = "enwik8"
    config.data.seq_len = 2_048
    config.data.global_batch_size = 128
    config.optim.learning_rate = 4e-4
    config.optim.beta2 = 0.98
    config.optim.eps = 1e-9
    config.optim.weight_decay = 2e-4
    config.optim.decay_times_rate = False
    config.optim.clip_norm = 0.1
    config.optim.warmup_steps = 10_000
    config.train.n_steps = 125_000
    config.train.cold_start_every = 4  # sequences of 8192 bytes
    config.train.loss_chunk_len = 512
    config.train.checkpoint_every = 1_000
    config.eval.every = 1_000
    config.eval.batch_size = 32
    return config
