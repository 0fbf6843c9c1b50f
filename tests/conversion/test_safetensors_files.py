"""Folders from anywhere: whole, sharded, damaged, hostile."""

import json
import struct

import numpy as np
import pytest

from longctx_jax.conversion import safetensors_files as files


def edit_index(folder, edit):
    path = folder / files.INDEX_FILE
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def test_shards_are_found_through_their_index(checkpoint):
    found = files.find_tensors(checkpoint("untied_llama3_sharded"))
    assert len(found) == 21 and len({tensor.path for tensor in found.values()}) == 2
    table = found["model.embed_tokens.weight"]
    assert (table.shape, table.dtype) == ((64, 16), "F32")


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.bin", "..", ""],
)
def test_an_index_names_files_of_its_folder_only(checkpoint, name):
    folder = checkpoint("untied_llama3_sharded")
    files.write_tensors(folder.parent, {"x": np.zeros(1)})
    (folder.parent / files.WEIGHTS_FILE).rename(folder.parent / "secret.safetensors")
    edit_index(folder, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(ValueError, match="must name safetensors files of its own folder: got"):
        files.find_tensors(folder)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda i: i.pop("weight_map"), "must map tensors to files in weight_map"),
        (lambda i: i["weight_map"].update(a=3), "must map tensors to files in weight_map"),
        (lambda i: i["weight_map"].pop("model.norm.weight"), "model.norm.weight not in the index"),
        (
            lambda i: i["weight_map"].update(more="model-00001-of-00002.safetensors"),
            "differs in 1 tensors: more in no file",
        ),
    ],
    ids=["no map", "no names", "less", "more"],
)
def test_an_index_that_contradicts_its_files(checkpoint, edit, match):
    folder = checkpoint("untied_llama3_sharded")
    edit_index(folder, edit)
    with pytest.raises(ValueError, match=match):
        files.find_tensors(folder)


def test_a_missing_shard_is_named(checkpoint):
    folder = checkpoint("untied_llama3_sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00002.safetensors"):
        files.find_tensors(folder)


def test_a_tensor_in_two_shards_is_named(checkpoint):
    folder = checkpoint("untied_llama3_sharded")
    first, second = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"differs in .*model\.norm\.weight twice"):
        files.find_tensors(folder)


def test_pickles_are_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    match = "has pytorch_model.bin, and opening a pickle runs the code in it"
    with pytest.raises(FileNotFoundError, match=match):
        files.find_tensors(tmp_path)


def test_an_empty_folder_names_what_is_needed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors or model\.safeten"):
        files.find_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        files.read_json(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "must be JSON"),
        (b"\xff", "must be JSON"),
        (b"[" * 100_000, "must be JSON"),
        (b"[1]", "must hold a JSON object: .* holds a list"),
    ],
    ids=["cut", "bytes", "deep", "list"],
)
def test_json_that_is_none(tmp_path, content, match):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        files.read_json(path)


def test_json_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "JSON_MAX_BYTES", 3)
    (tmp_path / "config.json").write_text("{   }")
    with pytest.raises(ValueError, match="must be at most 3 bytes"):
        files.read_json(tmp_path / "config.json")


def header(shape, offsets, n_bytes):
    text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_bytes)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 16,
        header([2], [0, 8], 7),
        header([2**40], [0, 2**42], 8),
        header([2**40, 2**40], [0, 8], 8),
        header([3], [0, 8], 8),
        header([2], [-4, 4], 8),
    ],
    ids=["empty", "length", "cut", "huge", "overflow", "shape", "negative"],
)
def test_damaged_files_are_refused_before_anything_is_read(tmp_path, content):
    (tmp_path / files.WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=r"must be whole safetensors files: .*model\.safetensors"):
        files.find_tensors(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    files.write_tensors(tmp_path, {"x": np.ones(2, np.float32)})
    before = (tmp_path / files.WEIGHTS_FILE).read_bytes()

    def fail(arrays, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    package = files.import_safetensors()
    monkeypatch.setattr(package.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_tensors(tmp_path, {"x": np.zeros(2, np.float32)})
    assert (tmp_path / files.WEIGHTS_FILE).read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_package_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    (tmp_path / files.WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(ImportError, match=r'pip install "longctx_jax\[hf\]"'):
        files.find_tensors(tmp_path)
