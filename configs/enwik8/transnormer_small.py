"""TransNormerLLM's attention on enwik8: decay_small.py with rates that fall with depth.

Silu features instead of rotations, a gate without activation, one norm without scale over all
heads.
"""

import ml_collections

from configs.enwik8 import decay_small


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config."""
    config = decay_small.get_config(arg)
    config.model.decay.kind = "transnormer"
    config.model.decay.depth = "linear"
    config.model.decay.position = "none"
    config.model.decay.feature_map = "silu"
    config.model.decay.gate = "linear"
    config.model.decay.head_norm = "plain_rms"
    config.model.decay.norm_span = "all"
    config.model.decay.scale_query = False
    return config
