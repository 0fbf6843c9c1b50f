"""Five layers of gated retention, then one of full attention, twice, on enwik8.

The remedy where old information must not fade: one layer in six keeps every token. For constant
memory use "sliding" in place of "softmax", as configs/pg19/hybrid_small.py does.
"""

import ml_collections

from configs.enwik8 import gated_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = gated_small.get_config(arg)
    config.model.pattern = ("decay",) * 5 + ("softmax",)
    return config
