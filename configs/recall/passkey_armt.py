r"""A digit hidden in the text of books, recalled by ARMT: two segments of 48 bytes, and a question.

The model of associative_armt.py. Five minutes on a shared CPU of two cores; right on all validation
rows after 100 updates. Then more segments, from these weights:

    python -m scripts.train --config=configs/recall/passkey_armt.py --workdir=runs/passkey_5 \
        --config.train.init_from=runs/passkey_2 --config.data.seq_len=288 \
        --config.model.memory.eps=0.1 \
        --config.optim.learning_rate=5e-3 --config.train.n_steps=250
"""

import ml_collections

from configs.recall import associative_armt


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = associative_armt.get_config(arg)
    config.model.memory.segment_len = 48
    config.data.name = "recall_passkey"
    config.data.recall.segment_len = 48
    config.data.recall.n_questions = 1
    config.data.recall.n_digits = 1
    config.data.seq_len = 48 * 3
    config.data.global_batch_size = 32
    config.train.n_steps = 600
    config.eval.every = 100
    return config
