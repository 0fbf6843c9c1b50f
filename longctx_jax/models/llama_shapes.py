"""The sizes of LLaMA models that papers measure on, as fields of config.model.

Source: Touvron et al. (2023), arXiv 2302.13971; Grattafiori et al. (2024), arXiv 2407.21783. The
160M model has the sizes of GPT-2 small. Vocabulary and weights are not part of a shape.
"""

from typing import Any

LLAMA_SHAPES: dict[str, dict[str, Any]] = {
    "160m": {"n_layers": 12, "d_model": 768, "n_heads": 12, "n_kv_heads": 12, "d_ff": 3_072},
    "1b": {"n_layers": 16, "d_model": 2_048, "n_heads": 32, "n_kv_heads": 8, "d_ff": 8_192},
    "3b": {"n_layers": 28, "d_model": 3_072, "n_heads": 24, "n_kv_heads": 8, "d_ff": 8_192},
    "8b": {"n_layers": 32, "d_model": 4_096, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14_336},
}


def llama_shape(name: str) -> dict[str, Any]:
    """Returns the fields of config.model for one of `LLAMA_SHAPES`.

    Raises:
        ValueError: if there is no such shape.
    """
    if name not in LLAMA_SHAPES:
        raise ValueError(
            f"a LLaMA shape must be one of {list(LLAMA_SHAPES)}: got {name!r}; e.g. "
            "--config=configs/llama_armt.py:1b"
        )
    return dict(LLAMA_SHAPES[name])
