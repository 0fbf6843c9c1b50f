"""The names of the files of a run's folder, said once, and how folders of runs are found.

| file | who writes it |
| --- | --- |
| config.json | the trainer, at the start: every field of the run's config |
| inputs.json, tokenizer/ | the trainer, at the start: digests of texts, copy of the tokenizer |
| metrics.jsonl, samples.jsonl, tensorboard/ | the trainer, as it goes |
| checkpoints/ | the trainer |
| DONE.json | the trainer, when the last update is done: the final record |
| .lock | the trainer, as long as it runs |
| hang.txt | its watchdog |
| evaluations.jsonl | `scripts.evaluate --watch` |
| log.txt | what starts runs for a sweep: their output |
"""

import copy
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

CONFIG = "config.json"
INPUTS = "inputs.json"
TOKENIZER = "tokenizer"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
EVALUATIONS = "evaluations.jsonl"
DONE = "DONE.json"
LOG = "log.txt"
LOCK = ".lock"
HANG = "hang.txt"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"

# Fields that configs of earlier versions have -> what they must say to mean the same today.
RETIRED = {
    "model.vq.smoothing": "clip",
    "model.stagformer.first_slot": "learned",
    "model.stagformer.pass_embedding": False,
}


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON so that the file is either the old or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)


def without_retired(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of a run without fields that no longer exist.

    Raises:
        ValueError: if one of them said something that nothing does any more.
    """
    config = copy.deepcopy(config)
    for field, meaning in RETIRED.items():
        *groups, name = field.split(".")
        node: Any = config
        for group in groups:
            node = node.get(group) if isinstance(node, dict) else None
        if not isinstance(node, dict) or name not in node:
            continue
        value = node.pop(name)
        if value != meaning:
            raise ValueError(
                f"config.{field} has only one meaning left, {meaning!r}: got {value!r:.50}; use "
                "the version of longctx_jax that wrote the run"
            )
    return config


def find_runs(folders: Sequence[str]) -> list[pathlib.Path]:
    """Returns the work directories among `folders` and their direct sub-folders, each once.

    Raises:
        FileNotFoundError: if one of them holds no metrics.
    """
    found: dict[pathlib.Path, None] = {}
    for folder in map(pathlib.Path, folders):
        if (folder / METRICS).is_file():
            below = [folder]
        else:
            below = sorted(path.parent for path in folder.glob(f"*/{METRICS}"))
        if not below:
            raise FileNotFoundError(
                f"a run's folder must hold {METRICS}: got {folder}; give the --workdir of "
                "scripts.train, or a folder of such folders"
            )
        found.update(dict.fromkeys(below))
    return list(found)
