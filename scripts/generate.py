"""Samples text from a run.

    python -m scripts.generate --workdir=DIR --prompt="..." [--max_new_tokens=N] [--temperature=T]

A prompt is the beginning of a document; where the model ends the document, printing stops.
"""

import os
import time

from absl import flags

from scripts import common

WORKDIR = common.workdir_flag()
STEP = flags.DEFINE_integer("step", -1, "Checkpoint to sample from; -1 = the newest.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; repeat for a batch.")
PROMPT_FILE = flags.DEFINE_multi_string("prompt_file", [], "File whose content is a prompt.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Tokens to draw for each prompt.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Below 1 sharpens; 0 = most likely token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among the k most likely tokens; 0 = all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the nucleus of this probability; 1 = all.")
SEED = flags.DEFINE_integer("seed", 0, "Of the draws.")
CACHE_LEN = flags.DEFINE_integer(
    "cache_len", 0, "Tokens full attention looks back on; 0 = as in training."
)


def main(arguments: list[str]) -> None:
    """Prints each prompt with its continuation to stdout, and the speed to stderr."""
    del arguments
    import sys

    import jax

    from longctx_jax import data
    from longctx_jax.decoding import NonFiniteLogitsError, generate
    from longctx_jax.decoding.sampling import Sampling
    from longctx_jax.runs.evaluate import eval_cache_len

    sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value)
    texts = [os.fsencode(p) for p in PROMPT.value]  # any bytes, valid UTF-8 or not
    for path in PROMPT_FILE.value:
        with open(path, "rb") as file:
            texts.append(file.read())
    if not texts:
        raise common.UsageError("a prompt is needed: got none; give --prompt='...'")
    run = common.restore_run(WORKDIR.value, STEP.value)
    tokenizer = data.build_tokenizer(run.config.data.tokenizer, run.config.data.data_dir)
    start = time.monotonic()
    try:
        tokens = generate(
            run.model,
            run.variables,
            [data.prompt_ids(tokenizer, text) for text in texts],
            max_new_tokens=MAX_NEW_TOKENS.value,
            key=jax.random.key(SEED.value),
            sampling=sampling,
            cache_len=CACHE_LEN.value or eval_cache_len(run.config),
        )
    except NonFiniteLogitsError as error:
        raise common.UsageError(f"step {run.step} of {WORKDIR.value}: {error}") from error
    seconds = time.monotonic() - start
    for text, row in zip(texts, tokens, strict=True):
        if len(texts) > 1:
            print("-" * 78)
        continuation = tokenizer.decode(data.until_separator(tokenizer, row))
        print((text + continuation).decode(errors="replace"))
    print(
        f"{tokens.size} tokens in {seconds:.1f} s, compilation included "
        f"(step {run.step}, temperature {sampling.temperature}, seed {SEED.value})",
        file=sys.stderr,
    )


if __name__ == "__main__":
    common.run(main)
