"""Everything as in a run, and its weights to start from: --config=configs/from_run.py:RUN_FOLDER.

For a new work directory: fine-tuning of a converted checkpoint, or of any other run. Fields are
changed as always, --config.train.n_steps=1000; those of config.model must stay.
"""

import json
import pathlib

import ml_collections

from configs import base
from longctx_jax import run_files

MAX_BYTES = 1_000_000  # a config has about 5,000
# What reading JSON, and giving a field a value that does not fit, may raise.
ERRORS = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config of the run in the folder `arg`, "" = the base config."""
    if not arg:
        return base.get_config()
    path = pathlib.Path(arg) / run_files.CONFIG
    if not path.is_file():
        raise ValueError(
            f"the config needs the folder of a run: {path} does not exist; write "
            "--config=configs/from_run.py:RUN_FOLDER"
        )
    config = read_config(path)
    config.train.init_from = arg
    return config


def read_config(path: pathlib.Path) -> ml_collections.ConfigDict:
    """Returns the config that a run's config.json holds; what it lacks is as in the base config.

    The file may come from somebody else.

    Raises:
        ValueError: if it is no config, or has fields or types that the base config has not.
    """
    remedy = "restore it from a copy, or use another run"
    config = base.get_config()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES} bytes")
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a {type(fields).__name__}")
        if "model" not in fields:
            remedy = (
                "a checkpoint of the LLaMA family becomes one with python -m scripts.convert "
                f"--from=hf_llama --path={path.parent} --workdir=NEW"
            )
            raise ValueError("it is not in the folder of a run")
        fields = run_files.without_retired(fields)
        _add_outside_mixers(config, fields["model"])
        config.update(fields)  # lists become the tuples they were
        absent = _absent(config)
        if absent:
            raise ValueError(f"config.{absent} is null")
    except ERRORS as error:
        text = " ".join(str(error.args[0] if error.args else error).split())
        raise ValueError(
            f"{path} must be the config of a run of this version: {text[:500]}; {remedy}"
        ) from error
    return config


def _add_outside_mixers(config: ml_collections.ConfigDict, model: dict) -> None:
    """Makes room for the fields of mixers that the run says it took from outside; imports none."""
    with config.unlocked():
        for named in model.get("outside_mixers", ()):
            kind = str(named).partition("=")[0]
            if kind not in config.model and isinstance(model.get(kind), dict):
                config.model[kind] = ml_collections.ConfigDict(model[kind])


def _absent(group: ml_collections.ConfigDict) -> str:
    """Returns the first field that is None, which every type lets pass; "" if there is none."""
    for name, value in group.items():
        if isinstance(value, ml_collections.ConfigDict):
            value = _absent(value)
            if value:
                return f"{name}.{value}"
        elif value is None:
            return name
    return ""
