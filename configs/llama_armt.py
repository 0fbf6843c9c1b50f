"""ARMT in the shapes of LLaMA models: --config=configs/llama_armt.py:1b (160m, 1b, 3b, 8b).

Segments of 1,024 tokens and 128 memory tokens, as the diagonal-batching paper measures: 3.3 times
as fast as full attention at 131,072 tokens there (1b). Run by diagonals. Vocabulary and data are
PG-19's sub-words; train the tokenizer as configs/pg19/transformer_vq_1b3.py says.

Source: Sivtsov et al. (2025), arXiv 2506.05229; shapes: Touvron et al. (2023), arXiv 2302.13971;
Grattafiori et al. (2024), arXiv 2407.21783.
"""

import ml_collections

from configs import base

# Vocabulary and weights are not part of a shape; 160m has the sizes of GPT-2 small.
SHAPES: dict[str, dict[str, int]] = {
    "160m": {"n_layers": 12, "d_model": 768, "n_heads": 12, "n_kv_heads": 12, "d_ff": 3_072},
    "1b": {"n_layers": 16, "d_model": 2_048, "n_heads": 32, "n_kv_heads": 8, "d_ff": 8_192},
    "3b": {"n_layers": 28, "d_model": 3_072, "n_heads": 24, "n_kv_heads": 8, "d_ff": 8_192},
    "8b": {"n_layers": 32, "d_model": 4_096, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14_336},
}


def get_config(arg: str = "1b") -> ml_collections.ConfigDict:
    """Returns the config of the shape that `arg` names."""
    name = arg or "1b"
    if name not in SHAPES:
        raise ValueError(
            f"a LLaMA shape must be one of {list(SHAPES)}: got {name!r}; e.g. "
            "--config=configs/llama_armt.py:1b"
        )
    config = base.get_config()
    config.model.update(SHAPES[name])
    config.model.name = "recurrent_memory"
    config.model.schedule = "diagonal"
    config.model.vocab_size = 32_000
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.model.softmax.rope_theta = 500_000.0
    config.model.memory.segment_len = 1_024
    config.model.memory.n_memory_tokens = 128
    config.data.name = "pg19"
    config.data.tokenizer = "pg19_32000.model"
    config.data.seq_len = 8_192
    config.data.global_batch_size = 16
    config.optim.learning_rate = 3e-4
    config.train.n_steps = 100_000
    config.train.loss_chunk_len = 1_024
    return config
