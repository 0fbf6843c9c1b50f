import subprocess
import sys

import numpy as np
import pytest

from longctx_jax import data
from longctx_jax.data import tfds_source


def prepare(folder, file_format):
    """Writes a tiny data set with PG-19's name and fields, ids not in order."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Pg19(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("0.1.1")
        pkg_dir_path = None

        def _info(self):
            fields = {"book_text": tfds.features.Text(), "book_id": np.int32}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(fields))

        def _split_generators(self, dl_manager):
            counts = {"train": 12, "validation": 2, "test": 1}
            return {split: self._generate_examples(n) for split, n in counts.items()}

        def _generate_examples(self, n):
            for i in range(n):
                yield i, {"book_text": f"book {i + 95} é\n", "book_id": i + 95}

    Pg19(data_dir=str(folder), file_format=file_format).download_and_prepare()


def test_prepared_books_come_in_order_of_id(make_config, tmp_path):
    prepare(tmp_path, "array_record")
    found = data.load_source(make_config(name="pg19_tfds", data_dir=str(tmp_path)))
    expected = [f"book {i + 95} é\n".encode() for i in range(12)]
    train = found["train"]
    assert train.read(0, train.n_bytes).tobytes() == b"".join(expected)
    assert train.document_starts.tolist() == np.cumsum([0, *map(len, expected)])[:-1].tolist()
    assert found["validation"].document_starts.size == 2
    assert found["test"].name == "pg19_tfds/test"
    assert "tensorflow" not in sys.modules


def test_books_are_sorted_and_text_is_encoded():
    records = [{"book_id": np.int32(10), "book_text": b"ten"}, {"book_id": 9, "book_text": "é"}]
    stream = tfds_source.read_books("train", records)
    assert stream.read(0, stream.n_bytes).tobytes() == "é".encode() + b"ten"


def test_not_prepared_gives_the_command(make_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="tfds build pg19 --file_format=array_record"):
        data.load_source(make_config(name="pg19_tfds", data_dir=str(tmp_path)))


def test_package_missing_says_what_to_install(make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="pip install tensorflow-datasets"):
        data.load_source(make_config(name="pg19_tfds", data_dir=str(tmp_path)))


def test_importing_data_loads_neither_tfds_nor_flax():
    code = "import sys, longctx_jax.data as d; print([m for m in sys.modules if '.' not in m])"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"tensorflow_datasets", "tensorflow", "flax"} & set(eval(loaded.stdout))
