"""InAttention on enwik8: transformer_small.py whose layers all attend to the embeddings.

Variants: --config.model.inattention.score_position=decoupled; the mode of constant memory, a
histogram of bytes: --config.model.inattention.memory_position=none
--config.model.inattention.score_position=near.
"""

import ml_collections

from configs.enwik8 import transformer_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = transformer_small.get_config(arg)
    config.model.name = "inattention"
    return config
