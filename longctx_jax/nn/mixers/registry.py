"""The list of mixers: what a word in `config.model.pattern` means. There is no other list.

A new mixer is a file here, a line below, and a group of commented fields in `configs/base.py`. One
that lives elsewhere is passed to `build_model(config.model, mixers={**MIXERS, "mine": MIXER})`.
"""

from longctx_jax.nn.contract import Mixer
from longctx_jax.nn.mixers import decay, mamba, rwkv, sliding, softmax, vq

MIXERS: dict[str, Mixer] = {
    "softmax": softmax.MIXER,
    "sliding": sliding.MIXER,
    "decay": decay.MIXER,
    "vq": vq.MIXER,
    "rwkv": rwkv.MIXER,
    "mamba": mamba.MIXER,
}
