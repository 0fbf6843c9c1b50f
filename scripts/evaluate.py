"""Evaluates a run on a split of its text.

    python -m scripts.evaluate --workdir=DIR [--step=N] [--split=test] [--max_bytes=N]
    python -m scripts.evaluate --workdir=DIR --watch [--poll_seconds=30]

The last line printed is one JSON object: split, bits_per_byte, nats_per_token, tokens, bytes, step
and more. With --watch it runs beside the training: a line for each checkpoint as it comes (the
newest, if several have), which DIR/evaluations.jsonl keeps, until the run is finished.
"""

import json
import pathlib
from typing import Any

from absl import flags

from longctx_jax import run_files
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
WATCH = flags.DEFINE_bool("watch", False, "Evaluate each new checkpoint until the run ends.")
POLL_SECONDS = flags.DEFINE_float(
    "poll_seconds", 30.0, "With --watch: between looks at the folder.", lower_bound=0.1
)


def main(arguments: list[str]) -> None:
    """Restores the run, streams the split, prints the result."""
    del arguments
    for flag in (MAX_BYTES, BATCH_SIZE, CACHE_LEN):
        if flag.value < 0:
            raise ValueError(
                f"--{flag.name} must not be negative: got {flag.value}; 0 is the default"
            )
    if WATCH.value:
        watch()
    else:
        print(json.dumps(evaluate_step(STEP.value)))


def watch() -> None:
    """Evaluates checkpoints as they come, newest first, and keeps the results."""
    from longctx_jax.training.watching import steps_as_they_come

    path = pathlib.Path(WORKDIR.value) / run_files.EVALUATIONS
    for step in steps_as_they_come(WORKDIR.value, path, POLL_SECONDS.value, SPLIT.value):
        line = json.dumps(evaluate_step(step))
        with path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def evaluate_step(step: int) -> dict[str, Any]:
    """Restores a step of the run, -1 = the newest, and streams the split through it."""
    from longctx_jax import data
    from longctx_jax.runs.evaluate import evaluate_split, require_text

    run = common.restore_run(WORKDIR.value, step)
    config = run.config
    config.eval.batch_size = BATCH_SIZE.value or config.eval.batch_size
    config.eval.cache_len = CACHE_LEN.value or config.eval.cache_len
    config.data.data_dir = DATA_DIR.value or config.data.data_dir
    stream = data.load_source(config.data)[SPLIT.value]
    require_text(WORKDIR.value, SPLIT.value, stream)
    result = evaluate_split(
        config, run.model, run.variables, stream, max_bytes=MAX_BYTES.value, show_progress=True
    )
    named = {"data": config.data.name, "split": SPLIT.value}
    return named | result | {"step": run.step}


if __name__ == "__main__":
    common.run(main)
