"""Trains a SentencePiece tokenizer on the training split of a data set.

    python -m scripts.train_tokenizer --config=configs/NAME.py --out=FILE.model [--vocab_size=32000]

The same text and settings give the same file. Prints how many bytes a token of the validation split
stands for, and the fields that use the file.
"""

import pathlib

from absl import flags

from scripts import common

CONFIG = common.config_flag()
OUT = flags.DEFINE_string("out", None, "Model file to write, *.model.", required=True)
VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", 32_000, "Number of ids, 3 control and 256 byte tokens among them.", lower_bound=1
)
MAX_BYTES = flags.DEFINE_integer(
    "max_bytes", 1_000_000_000, "Train on the first N bytes of the split; 0 = all.", lower_bound=0
)
COVERAGE = flags.DEFINE_float(
    "character_coverage", 1.0, "Share of the characters with a token of their own."
)
VALIDATION_BYTES = flags.DEFINE_integer(
    "validation_bytes", 5_000_000, "Measure on the first N bytes of that split.", lower_bound=1
)


def main(arguments: list[str]) -> None:
    """Trains, writes the file, measures, says how to use it."""
    del arguments
    from longctx_jax import data
    from longctx_jax.data.sentencepiece_training import train_model

    out = pathlib.Path(OUT.value)
    if out.suffix != ".model":
        raise common.UsageError(f"--out must end in .model: got {out}; rename it")
    if out.exists():
        raise ValueError(
            f"--out must be a new file, as runs may depend on an old one: {out} exists; choose "
            "another name or delete it"
        )
    splits = data.load_source(CONFIG.value.data)
    model = train_model(
        splits["train"],
        vocab_size=VOCAB_SIZE.value,
        max_bytes=MAX_BYTES.value,
        character_coverage=COVERAGE.value,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(model)
    tokenizer = data.build_tokenizer(str(out.absolute()))
    stream = splits["validation"]
    n_bytes = min(VALIDATION_BYTES.value, stream.n_bytes)
    n_tokens = tokenizer.encode(stream.read(0, n_bytes).tobytes()).size
    n_words = data.count_words(stream, n_bytes)
    print(f"wrote {out}: vocab_size={tokenizer.vocab_size}")
    print(
        f"{stream.name}: {n_bytes / n_tokens:.3f} bytes a token, {n_tokens / n_words:.3f} tokens "
        f"a word ({n_bytes} bytes)"
    )
    print(
        f"use: --config.data.tokenizer={out} --config.model.vocab_size={tokenizer.vocab_size} "
        f"with config.data.name={stream.name.partition('/')[0]!r} or similar text"
    )


if __name__ == "__main__":
    common.run(main)
