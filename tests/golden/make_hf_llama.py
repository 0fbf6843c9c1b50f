"""Writes tiny random checkpoints of the LLaMA family with the reference library, and their logits.

    python tests/golden/make_hf_llama.py

in an environment with torch and transformers (made with 2.15 and 5.23). Each case is a folder of
tests/golden/hf_llama as the library saves it, with `tokens.npy` (int32 [1, seq]) and `logits.npy`
(float32 [1, seq, vocab], computed in float64). Weights are seeded by the case's name.
"""

import pathlib
import shutil

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

FOLDER = pathlib.Path(__file__).resolve().parent / "hf_llama"
SEQ_LEN = 24
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
# name -> (kind of config, its changes, dtype of the file, size of a shard)
CASES = {
    "untied_llama3_sharded": (
        "Llama",
        {"rope_parameters": LLAMA3, "head_dim": 8},
        torch.float32,
        "16KB",
    ),
    "tied_mha": (
        "Llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-5},
        torch.float32,
        "1GB",
    ),
    "linear_bfloat16": (
        "Llama",
        {"rope_parameters": LINEAR, "head_dim": 6, "num_key_value_heads": 1},
        torch.bfloat16,
        "1GB",
    ),
    "yarn_float16": (
        "Llama",
        {
            "rope_parameters": YARN,
            "head_dim": 16,
            "hidden_size": 8,
            "max_position_embeddings": 512,
        },
        torch.float16,
        "1GB",
    ),
    "mistral": ("Mistral", {"sliding_window": 5}, torch.float32, "1GB"),
    "qwen3": (
        "Qwen3",
        {"head_dim": 8, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
        torch.float32,
        "1GB",
    ),
    "qwen3_mixed": (
        "Qwen3",
        {
            "head_dim": 6,
            "num_key_value_heads": 1,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
        torch.bfloat16,
        "1GB",
    ),
}

WITH_TOKENIZER = "with_tokenizer"
CASES[WITH_TOKENIZER] = (
    "Llama",
    {"vocab_size": 300, "hidden_size": 8, "tie_word_embeddings": True},
    torch.bfloat16,
    "1GB",
)


def save_tokenizer(folder: pathlib.Path) -> None:
    """Writes a byte-level tokenizer of 298 ids in the shape of LLaMA 3's."""
    begin, end = "<|begin_of_text|>", "<|end_of_text|>"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=296, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([pathlib.Path(__file__).read_text()], trainer)
    made.add_special_tokens([begin, end])
    single = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 296)])
    made.post_processor = single
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=begin, eos_token=end
    )
    fast.save_pretrained(folder)


def make(name: str) -> None:
    """Writes one case."""
    kind, changes, dtype, shard = CASES[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.copy_(1.0 + 0.3 * torch.randn_like(parameter))
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == WITH_TOKENIZER:
        save_tokenizer(folder)
    seq_len = SEQ_LEN // 4 if name == WITH_TOKENIZER else SEQ_LEN
    tokens = np.random.default_rng(len(name)).integers(0, config.vocab_size, (1, seq_len))
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = reference(torch.from_numpy(tokens)).logits
    np.save(folder / "tokens.npy", tokens.astype(np.int32))
    np.save(folder / "logits.npy", logits.numpy().astype(np.float32))


if __name__ == "__main__":
    for case in CASES:
        make(case)
