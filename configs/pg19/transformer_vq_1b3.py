r"""Transformer-VQ on PG-19 as published: 48 gated units x 2048, 1.3 G parameters, 32,000 pieces.

Published: word-level perplexity 26.6 on the test split (`perplexity_per_word`), after 500,000
updates of 128 x 2048 tokens. Differences from the published code as in
configs/enwik8/transformer_vq_190m.py; also, the embedding starts with standard deviation
1/sqrt(d_model) where theirs starts with 1 and scales the logits by 0.005. Train the tokenizer with

    python -m scripts.train_tokenizer --config=configs/pg19/transformer_vq_1b3.py \
        --out=pg19_32000.model --vocab_size=32000 --max_bytes=1000000000

Source: Lingle (2023), arXiv 2309.16354, and the scripts of its code.
"""

import ml_collections

from configs.enwik8 import transformer_vq_190m


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = transformer_vq_190m.get_config(arg)
    model = config.model
    model.d_model = 2_048
    model.d_value = 4_096
    model.vocab_size = 32_000
    model.tie_embeddings = True
    model.vq.position_dropout = 0.1
    model.dropout = 0.1
    model.layer_drop = 0.1
    config.data.name = "pg19"
    config.data.tokenizer = "pg19_32000.model"
    config.optim.name = "adafactor"
    config.optim.learning_rate = 1e-2
    config.optim.parameter_scale = True
    config.optim.weight_decay = 0.0
    config.optim.decay_times_rate = True
    config.optim.clip_norm = 0.0
    config.train.n_steps = 500_000
    return config
