"""Checkpoints, ours and those of others: descriptions, safetensors, their index, config.json."""

import json
import pathlib
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from longctx_jax.conversion import hf_config, tokenizer_files
from longctx_jax.conversion import safetensors_files as files
from longctx_jax.models import build_model
from longctx_jax.training.checkpoint import Checkpointer, CheckpointError
from tests.fuzz import hostile

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "hf_llama"
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
}
INDEX = {
    "metadata": {"total_size": 8},
    "weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"},
}

pytestmark = pytest.mark.parametrize("n_examples", hostile.SIZES)


def with_header(header, n_bytes=22):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_bytes)


def read_all(folder):
    for name, tensor in files.find_tensors(folder).items():
        if tensor.dtype in files.DTYPES:
            assert files.read_float32(tensor, name).shape == tensor.shape


def test_safetensors(tmp_path, n_examples):
    path = tmp_path / files.WEIGHTS_FILE
    lengths = st.sampled_from([0, 1, 2**31, 2**63 - 1, 2**64 - 1])
    contents = st.one_of(
        hostile.damaged_bytes(with_header(HEADER)),
        hostile.damaged_objects(HEADER).map(with_header),
        lengths.map(lambda n: struct.pack("<Q", n) + b"{}"),
        st.sampled_from(hostile.TEXTS).map(lambda t: struct.pack("<Q", len(t)) + t),
        st.binary(),
    )

    def check(raw):
        path.write_bytes(raw)
        hostile.refused(lambda: read_all(tmp_path), path)

    hostile.fuzz(n_examples, contents, check)


def test_index_of_shards(tmp_path, n_examples):
    for name, tensor in (("model-1", "x"), ("model-2", "y")):
        files.write_tensors(tmp_path, {tensor: np.zeros(1, np.float32)})
        (tmp_path / files.WEIGHTS_FILE).rename(tmp_path / f"{name}.safetensors")
    path = tmp_path / files.INDEX_FILE
    names = ["../x.safetensors", "/x.safetensors", ".x.safetensors", "a/b.safetensors", "\x00"]
    names += [
        "\ud800.safetensors",
        "x" * 5000 + ".safetensors",
        "a\n.safetensors",
        "a.safetensors\n",
    ]

    def check(raw):
        path.write_bytes(raw)
        hostile.refused(lambda: read_all(tmp_path), tmp_path)

    always = [json.dumps({"weight_map": {"x": name}}).encode() for name in names]
    hostile.fuzz(n_examples, hostile.json_files(INDEX), check, always)


@pytest.mark.parametrize("case", sorted(p.parent.name for p in GOLDEN.glob("*/config.json")))
def test_config_of_another_library(case, n_examples):
    given = json.loads((GOLDEN / case / "config.json").read_text())

    def check(given):
        if not hostile.refused(lambda: hf_config.model_fields(given), "config.json: "):
            fields = hf_config.model_fields(given)
            assert fields["n_layers"] <= hf_config.MAX_LAYERS
            hostile.refused(lambda: build_model(fields), "config.model.")

    changes = [{"model_type": []}, {"num_hidden_layers": 2**31 - 1}, {"rope_scaling": {"type": []}}]
    changes += [{"model_type": "qwen3", "layer_types": [{}] * given["num_hidden_layers"]}]
    always = [given | change for change in changes]
    hostile.fuzz(max(n_examples // 2, 20), hostile.damaged_objects(given), check, always)


def test_sizes_of_another_library(n_examples):
    """Each size by itself: nothing is listed or allocated before it is known to be possible."""
    given = json.loads((GOLDEN / "untied_llama3_sharded" / "config.json").read_text())
    sizes = [name for name, value in given.items() if type(value) is int]

    def check(change):
        name, value = change
        fields = given | {name: value}
        if not hostile.refused(lambda: hf_config.model_fields(fields), name):
            hostile.refused(lambda: build_model(hf_config.model_fields(fields)), "config.model.")

    pairs = st.tuples(st.sampled_from(sizes), st.integers() | st.sampled_from([2**31 - 1, 2**31]))
    hostile.fuzz(n_examples, pairs, check)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A run with one checkpoint, and the file of its description."""
    workdir = tmp_path_factory.mktemp("run")
    checkpointer = Checkpointer(workdir)
    checkpointer.save(1, {"w": jnp.ones(3)}, {"model": {"name": "decay"}})
    checkpointer.close()
    path = workdir / "checkpoints" / "1" / "meta" / "metadata"
    return workdir, path, path.read_bytes()


def test_description_of_a_checkpoint(checkpoint, n_examples):
    workdir, path, whole = checkpoint
    checkpointer = Checkpointer(workdir, is_read_only=True)
    template = {"w": jnp.zeros(3)}
    assert checkpointer.restore(1, template).state["w"].tolist() == [1, 1, 1]

    def check(raw):
        path.write_bytes(raw)
        try:
            restored = checkpointer.restore(1, template)
        except (CheckpointError, ValueError) as error:
            assert str(workdir) in str(error)
            return
        assert restored.state["w"].tolist() == [1, 1, 1]

    try:
        hostile.fuzz(max(n_examples // 2, 20), hostile.json_files(json.loads(whole)), check)
    finally:
        path.write_bytes(whole)


def test_sizes_of_tokenizer_files(tmp_path, n_examples, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "MAX_BYTES", 100)
    source = tmp_path / "source"
    source.mkdir()

    def check(raw):
        (source / "tokenizer.json").write_bytes(raw)
        is_refused = hostile.refused(
            lambda: tokenizer_files.copy_tokenizer(source, tmp_path / "copy"), source
        )
        assert is_refused == (len(raw) > 100)

    hostile.fuzz(max(n_examples // 4, 10), st.binary(max_size=200), check, [b"x" * 101])
