"""Folders of safetensors files: one `model.safetensors`, or shards and their index.

Source: the format's description at github.com/huggingface/safetensors. A folder is untrusted input:
nothing is unpickled, an index may name files of its own folder only, and kind and shape of every
tensor are known before one is read. Not here: what the tensors mean (`hf_llama.py`).
"""

import dataclasses
import pathlib
import re
import tempfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401  with it numpy knows bfloat16
import numpy as np

from longctx_jax import json_files

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
SHARD_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}\.safetensors"  # no folder, nothing hidden
JSON_MAX_BYTES = 32_000_000  # an index has about 100 bytes a tensor
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # that are read, bytes a number


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """Where a tensor is and what it is like."""

    path: pathlib.Path
    shape: tuple[int, ...]
    dtype: str  # as the format names it, a key of DTYPES or another


def import_safetensors() -> Any:
    """Returns the package `safetensors`; raises ImportError naming the extra that has it."""
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            f"safetensors files need the package safetensors, which cannot be imported ({error}); "
            'run `pip install "longctx_jax[hf]"`'
        ) from error
    return safetensors


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is too large or no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"a checkpoint folder must hold {path.name}: {path.parent} has none; give --path=DIR "
            "of a checkpoint as the reference library saves it"
        )
    return json_files.read_object(path, remedy="download it again", max_bytes=JSON_MAX_BYTES)


def find_tensors(folder: pathlib.Path) -> dict[str, TensorFile]:
    """Returns every tensor of a checkpoint folder by name, from the files' headers alone.

    Raises:
        FileNotFoundError: no weights, or a shard is missing; says so where they are pickled.
        ValueError: a file that is not safetensors, or an index that contradicts its files.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        return _find_sharded(folder, read_json(index))
    if (folder / WEIGHTS_FILE).is_file():
        return _headers(folder / WEIGHTS_FILE)
    pickled = sorted(path.name for pattern in PICKLED for path in folder.glob(pattern))
    if pickled:
        raise FileNotFoundError(
            f"weights must be safetensors: {folder} has {', '.join(pickled[:5])}, and opening a "
            "pickle runs the code in it; download the safetensors files, or save the model once "
            "with the reference library (save_pretrained) where you trust it"
        )
    raise FileNotFoundError(
        f"a checkpoint folder must hold {WEIGHTS_FILE} or {INDEX_FILE}: {folder} has neither; "
        "give --path=DIR of a checkpoint as the reference library saves it"
    )


def _find_sharded(folder: pathlib.Path, index: dict[str, Any]) -> dict[str, TensorFile]:
    places = index.get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ValueError(
            f"{INDEX_FILE} must map tensors to files in weight_map: {folder} has another one; "
            "download it again"
        )
    files = sorted(set(places.values()))
    for name in files:
        if not re.fullmatch(SHARD_NAME, name):
            raise ValueError(
                f"{INDEX_FILE} must name safetensors files of its own folder: got {name!r} in "
                f"{folder}; do not use this checkpoint, or correct its index"
            )
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"all shards that {INDEX_FILE} names must be there: {folder} lacks "
            f"{', '.join(absent[:20])}; download them"
        )
    found: dict[str, TensorFile] = {}
    wrong = []
    for name in files:
        here = _headers(folder / name)
        wrong += [f"{tensor} twice" for tensor in here if tensor in found]
        found |= here
    wrong += [f"{t} in no file" for t in places if t not in found]
    wrong += [f"{t} not in the index" for t in found if t not in places]
    wrong += [
        f"{t} in {found[t].path.name}, not in {name}"
        for t, name in places.items()
        if t in found and found[t].path.name != name
    ]
    if wrong:
        raise ValueError(
            f"{INDEX_FILE} must agree with its files: {folder} differs in {len(wrong)} tensors: "
            f"{'; '.join(wrong)}; download the checkpoint again"
        )
    return found


def _headers(path: pathlib.Path) -> dict[str, TensorFile]:
    safetensors = import_safetensors()
    try:
        with safetensors.safe_open(path, framework="np") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118  the file is no mapping
                part = file.get_slice(name)
                found[name] = TensorFile(path, tuple(part.get_shape()), part.get_dtype())
            return found
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"weights must be whole safetensors files: {path} is not ({error}); download it again"
        ) from error


def read_float32(tensor: TensorFile, name: str) -> np.ndarray:
    """Returns a tensor's numbers as float32; its kind must be one of DTYPES.

    bfloat16 and float16 are exact in float32; float64 is rounded.
    """
    with import_safetensors().safe_open(tensor.path, framework="np") as file:
        return np.asarray(file.get_tensor(name)).astype(np.float32)


def write_tensors(folder: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes `model.safetensors`, so that it is whole or absent."""
    package = import_safetensors()
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{WEIGHTS_FILE}.") as temporary:
        path = pathlib.Path(temporary) / WEIGHTS_FILE
        package.numpy.save_file(arrays, path, metadata={"format": "pt"})
        path.chmod(0o644)
        path.replace(folder / WEIGHTS_FILE)
