"""A 1B shape with every scheme: --config=configs/accounting_1b.py:mha (names: SCHEMES below).

16 layers x 2,048, 32 heads of 64, a gated MLP of 8,192 and 32,000 tied embeddings in bfloat16: the
sizes of LLaMA 3.2 1B but for its vocabulary. What differs from "mha" is what a scheme is about, so
memory can be compared: python -m scripts.accounting --schemes=all. Data are PG-19's sub-words.
"""

from typing import Any

import ml_collections

from configs import base

SHAPE = {"n_layers": 16, "d_model": 2_048, "n_heads": 32, "d_ff": 8_192, "vocab_size": 32_000}
MEMORY = {"segment_len": 512, "n_memory_tokens": 16, "d_memory": 64, "nu": 3}
# Scheme -> fields of config.model that are not those of "mha".
SCHEMES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"n_kv_heads": 8},
    "mqa": {"n_kv_heads": 1},
    "sliding": {"pattern": ("sliding",), "sliding": {"window_len": 4_096}},
    "sliding_gqa": {"pattern": ("sliding",), "sliding": {"window_len": 4_096}, "n_kv_heads": 8},
    "vq": {"name": "transformer_vq", "vq": {"codebook_size": 512, "window_len": 512}},
    # Two gated units are a layer and its MLP.
    "vq_gated": {
        "name": "transformer_vq",
        "n_layers": 32,
        "n_heads": 1,
        "d_key": 128,
        "d_value": 4_096,
        "mlp": "none",
        "vq": {"codebook_size": 512, "window_len": 512, "gate": "silu"},
    },
    "armt": {"name": "recurrent_memory", "memory": MEMORY},
    "layerwise": {"name": "recurrent_memory", "memory": MEMORY | {"kind": "layerwise"}},
    "rmt": {"name": "recurrent_memory", "memory": MEMORY | {"kind": "rmt"}},
    "decay": {"name": "decay"},
    "decay_wide": {"name": "decay", "d_value": 128},
    "decay_sliding": {
        "pattern": ("decay", "decay", "decay", "sliding"),
        "sliding": {"window_len": 4_096},
    },
    "rwkv4": {"pattern": ("rwkv",), "mlp": "rwkv", "rwkv": {"version": 4}},
    "rwkv6": {"pattern": ("rwkv",), "mlp": "rwkv"},
    "mamba1": {"pattern": ("mamba",), "mamba": {"version": 1}},
    "mamba2": {"pattern": ("mamba",), "mamba": {"d_state": 128}},
    "stagformer": {"name": "stagformer"},
    "stagformer_memory": {
        "name": "stagformer",
        "stagformer": {"cross_cache": "memory", "cross_position": "none"},
    },
    "stagformer_window": {"name": "stagformer", "stagformer": {"cross_window": 512}},
    "inattention": {"name": "inattention", "inattention": {"cache": "embedding"}},
    "inattention_narrow": {
        "name": "inattention",
        "inattention": {"cache": "embedding", "d_memory": 512},
    },
    "inattention_ids": {"name": "inattention", "inattention": {"cache": "ids"}},
    "inattention_counts": {
        "name": "inattention",
        "inattention": {"memory_position": "none", "score_position": "near", "cache": "counts"},
    },
}


def get_config(arg: str = "mha") -> ml_collections.ConfigDict:
    """Returns the config of the scheme that `arg` names."""
    name = arg or "mha"
    if name not in SCHEMES:
        raise ValueError(
            f"a scheme must be one of {list(SCHEMES)}: got {name!r}; e.g. "
            "--config=configs/accounting_1b.py:gqa"
        )
    config = base.get_config()
    config.model.update(SHAPE)
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.update(SCHEMES[name])
    config.data.name = "pg19"
    config.data.tokenizer = "pg19_32000.model"
    config.data.seq_len = 4_096
    config.data.global_batch_size = 64
    config.optim.learning_rate = 3e-4
    config.train.n_steps = 100_000
    config.train.loss_chunk_len = 512
    return config
