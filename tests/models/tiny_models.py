"""Tiny models that several files share."""

TINY = {
    "n_layers": 2,
    "d_model": 16,
    "n_heads": 2,
    "vocab_size": 11,
    "d_ff": 24,
    "decay": {"chunk_len": 4},
    "sliding": {"window_len": 5},
}
MODELS = {
    "mha": {},
    "gqa_relative": {
        "n_heads": 4,
        "n_kv_heads": 2,
        "softmax": {"position": "relative", "qk_norm": True},
    },
    "sliding": {"pattern": ("sliding",), "d_value": 6},
    "decay": {
        "name": "decay",
        "d_value": 6,
        "norm": "layer",
        "mlp": "gelu",
        "decay": {"chunk_len": 4, "conv_len": 3},
    },
    "vq": {
        "name": "transformer_vq",
        "n_kv_heads": 1,
        "d_value": 6,
        "mlp": "relu2",
        "vq": {"codebook_size": 7, "window_len": 5, "block_len": 4},
    },
    "vq_gated": {
        "name": "transformer_vq",
        "n_heads": 1,
        "mlp": "none",
        "d_value": 20,
        "vq": {"codebook_size": 7, "window_len": 4, "gate": "silu"},
    },
    "rwkv4": {
        "pattern": ("rwkv",),
        "mlp": "rwkv",
        "norm": "layer",
        "rwkv": {"version": 4, "chunk_len": 4},
    },
    "rwkv6": {
        "pattern": ("rwkv",),
        "mlp": "rwkv",
        "d_value": 6,
        "rwkv": {"chunk_len": 4, "shift_rank": 2, "decay_rank": 3},
    },
    "mamba1": {
        "pattern": ("mamba",),
        "mlp": "none",
        "mamba": {"version": 1, "d_state": 3, "step_rank": 2, "chunk_len": 4},
    },
    "mamba2": {
        "pattern": ("mamba",),
        "mamba": {"d_state": 3, "head_len": 8, "n_groups": 2, "conv_len": 3, "chunk_len": 4},
    },
    "stagformer": {"name": "stagformer"},
    "inattention": {"name": "inattention", "inattention": {"n_exact": 3, "max_distance": 8}},
    "mixed": {
        "pattern": ("decay", "decay", "sliding"),
        "n_layers": 3,
        "n_kv_heads": 1,
        "tie_embeddings": False,
        "decay": {
            "chunk_len": 4,
            "kind": "gated",
            "depth": "linear",
            "feature_map": "silu",
            "gate": "sigmoid",
        },
    },
}
