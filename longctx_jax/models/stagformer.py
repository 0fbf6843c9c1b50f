"""StagFormer: stacks of layers one token behind each other, which decode in parallel.

Source: Cutler et al. (2025), arXiv 2501.15665. Options beside it: handoff "add" is the shift of
Wu et al. (2025), arXiv 2510.24824, without its gated windows; stagger=False is the control that
sees the stack below at the token itself.
"""

from longctx_jax.models.base import Decoder
from longctx_jax.models.config import ModelConfig
from longctx_jax.models.stack import MIXERS


def build(config: ModelConfig) -> Decoder:
    """Returns the decoder; the pattern repeats within each stack, by default softmax attention.

    Raises:
        ValueError: if n_layers is not a multiple of stacks times pattern, or fields contradict.
    """
    config = config.with_pattern(("softmax",), tuple(MIXERS))
    stag = config.stagformer
    unit = stag.n_stacks * len(config.pattern)
    if config.n_layers % unit:
        raise ValueError(
            "config.model.n_layers must be a multiple of stagformer.n_stacks times the pattern's "
            f"length: got n_layers={config.n_layers}, {stag.n_stacks} stacks, "
            f"pattern={config.pattern}; use n_layers={-(-config.n_layers // unit) * unit}"
        )
    if stag.cross_cache == "memory" and config.segment_len:
        raise ValueError(
            "config.model.segment_len must be 0 with stagformer.cross_cache='memory', whose rows "
            f"all layers share: got {config.segment_len}; use cross_cache='kv'"
        )
    if config.layer_axis:
        raise ValueError(
            f"config.model.layer_axis does not fit stagformer: got {config.layer_axis!r}; use "
            "stagformer.stack_axis"
        )
    return Decoder(config)
