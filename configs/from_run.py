"""Everything as in a run, and its weights to start from: --config=configs/from_run.py:RUN_FOLDER.

For a new work directory: fine-tuning of a converted checkpoint, or of any other run. Fields are
changed as always, --config.train.n_steps=1000; those of config.model must stay.
"""

import json
import pathlib

import ml_collections

from configs import base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the run in the folder `arg`, "" = the base config."""
    config = base.get_config()
    if not arg:
        return config
    path = pathlib.Path(arg) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"the config needs the folder of a run: {path} does not exist; write "
            "--config=configs/from_run.py:RUN_FOLDER"
        )
    config.update(json.loads(path.read_text()))  # lists become the tuples they were
    config.train.init_from = arg
    return config
