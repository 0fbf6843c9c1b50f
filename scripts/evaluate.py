"""Evaluates a run on a split of its text.

    python -m scripts.evaluate --workdir=DIR [--step=N] [--split=test] [--max_bytes=N]

The last line printed is one JSON object: split, bits_per_byte, nats_per_token, tokens, bytes, step
and more.
"""

import json

from absl import flags

from scripts import common

WORKDIR = common.workdir_flag()
STEP = flags.DEFINE_integer("step", -1, "Checkpoint to evaluate; -1 = the newest.")
SPLIT = flags.DEFINE_string("split", "test", "train, validation or test.")
MAX_BYTES = flags.DEFINE_integer("max_bytes", 0, "Evaluate the first N bytes only; 0 = all.")
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    0,
    "Stripes the split is cut into, each starting cold; 0 = config.eval.batch_size.",
)
CACHE_LEN = flags.DEFINE_integer(
    "cache_len", 0, "Tokens full attention looks back on; 0 = as in training."
)
DATA_DIR = flags.DEFINE_string("data_dir", "", "Folder of the data set; '' = as in training.")


def main(arguments: list[str]) -> None:
    """Restores the run, streams the split, prints the result."""
    del arguments
    from longctx_jax import data
    from scripts import assembly

    for flag in (MAX_BYTES, BATCH_SIZE, CACHE_LEN):
        if flag.value < 0:
            raise ValueError(
                f"--{flag.name} must not be negative: got {flag.value}; 0 is the default"
            )
    run = assembly.restore_run(WORKDIR.value, STEP.value)
    config = run.config
    config.eval.batch_size = BATCH_SIZE.value or config.eval.batch_size
    config.eval.cache_len = CACHE_LEN.value or config.eval.cache_len
    config.data.data_dir = DATA_DIR.value or config.data.data_dir
    stream = data.load_source(config.data)[SPLIT.value]
    result = assembly.evaluate_split(
        config, run.model, run.variables, stream, max_bytes=MAX_BYTES.value, show_progress=True
    )
    named = {"data": config.data.name, "split": SPLIT.value}
    print(json.dumps(named | result | {"step": run.step}))


if __name__ == "__main__":
    common.run(main)
