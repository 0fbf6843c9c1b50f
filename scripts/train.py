"""Trains a model and saves it.

    python -m scripts.train --config=configs/NAME.py --workdir=DIR [--config.field=value ...]

Started again with the same command, it resumes; SIGTERM saves and exits 0.
"""

import json

from scripts import common

CONFIG = common.config_flag()
WORKDIR = common.workdir_flag()


def main(arguments: list[str]) -> None:
    """Trains, evaluates, saves; prints the final record as one JSON line."""
    del arguments
    from longctx_jax import data
    from longctx_jax.models import build_model
    from longctx_jax.training.loop import train
    from scripts import assembly

    config = CONFIG.value
    model = build_model(config.model)
    splits = data.load_source(config.data)
    record = train(
        config,
        WORKDIR.value,
        model,
        assembly.train_data(config, splits),
        assembly.evaluator(config, model, splits),
    )
    print(json.dumps(record))


if __name__ == "__main__":
    common.run(main)
