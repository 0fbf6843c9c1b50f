"""Associative retrieval by ARMT: one pair a segment of 6 bytes, three pairs, two questions.

Three minutes on a shared CPU of two cores. Reached 0.79 on the validation rows (both questions; a
guess among the row's three values, and the other one after the first answer, gets about 0.5). That
is not yet robust: keys are told apart after 200 steps or, with as little as a longer warm-up, not
within 1,100; at twice the learning rate the gradient became NaN. See docs/recall.md.
"""

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = base.get_config(arg)
    config.model.name = "recurrent_memory"
    config.model.n_layers = 2
    config.model.d_model = 64
    config.model.n_heads = 2
    config.model.unroll = 2
    config.model.tie_embeddings = False  # tied ones start small beside what layers add
    config.model.memory.kind = "armt"
    config.model.memory.segment_len = 6
    config.model.memory.n_memory_tokens = 1
    config.model.memory.d_memory = 16
    config.data.name = "recall_associative"
    config.data.order = "shuffled"
    config.data.recall.segment_len = 6
    config.data.recall.key_len = 1
    config.data.recall.n_symbols = 6  # few letters first: each is seen often
    config.data.recall.n_questions = 2
    config.data.seq_len = 6 * 4  # three segments with a pair each, and the questions
    config.data.global_batch_size = 64
    config.optim.name = "muon"
    config.optim.learning_rate = 1e-2
    config.optim.schedule = "wsd"
    config.optim.final_fraction = 0.0
    config.optim.decay_fraction = 0.4
    config.optim.warmup_steps = 50
    config.optim.weight_decay = 0.0
    config.train.n_steps = 1_000
    config.train.checkpoint_every = 500
    config.eval.every = 250
    config.eval.batch_size = 64
    config.log.every = 50
    return config
