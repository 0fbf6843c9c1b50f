"""The models of the StagFormer paper: --config=configs/stagformer_paper.py:stag (18, 36, stag).

18 and 36 layers of full attention, 1.6 B and 2.8 B parameters, and two stacks of 18 with weights of
their own, 2.9 B. Context 1,024, 1,280 rows an update. The paper gives the parameters and no sizes:
width 1,536, a gated MLP of 8 times that, and 256,000 tied embeddings are the sizes that fit all
three (1.58 B, 2.77 B, 2.94 B). Data are PG-19 here, the Pile there; it gives no optimizer.

Source: Cutler et al. (2025), arXiv 2501.15665.
"""

import ml_collections

from configs import base

MODELS = {"18": 18, "36": 36, "stag": 36}


def get_config(arg: str = "stag") -> ml_collections.ConfigDict:
    """Returns the config of the model that `arg` names."""
    name = arg or "stag"
    if name not in MODELS:
        raise ValueError(
            f"a model of the StagFormer paper must be one of {list(MODELS)}: got {name!r}; e.g. "
            "--config=configs/stagformer_paper.py:stag"
        )
    config = base.get_config()
    config.model.name = "stagformer" if name == "stag" else "transformer"
    config.model.n_layers = MODELS[name]
    config.model.d_model = 1_536
    config.model.n_heads = 12
    config.model.d_ff = 12_288
    config.model.vocab_size = 256_000
    config.model.dtype = "bfloat16"
    config.model.remat = "full"
    config.data.name = "pg19"
    config.data.tokenizer = "pg19_256000.model"
    config.data.seq_len = 1_024
    config.data.global_batch_size = 1_280
    config.optim.learning_rate = 4e-4
    config.optim.warmup_steps = 5_000
    config.train.n_steps = 250_000
    config.train.loss_chunk_len = 128
    config.train.carry_cache = False
    return config
