"""The user's own files: compressed, tables, folders, splits of their own, and what is no text."""

import bz2
import gzip
import json
import lzma
import os

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from longctx_jax import data
from longctx_jax.data import enwik8, text_files

TEXTS = ["first document\n", "the second, with caf\u00e9", "third"]


def read_all(stream):
    return stream.read(0, stream.n_bytes).tobytes()


def load(make_config, *files, **fields):
    fields = {"validation_fraction": 0.0, "test_fraction": 0.0, **fields}
    return data.load_source(make_config(files=tuple(map(str, files)), **fields))


def lines():
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))


@pytest.mark.parametrize(
    ("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_compressed_files_are_their_content(make_config, tmp_path, suffix, compress):
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(TEXTS[0].encode()))
    (tmp_path / "b.txt").write_bytes(TEXTS[1].encode())
    (tmp_path / f"c.jsonl{suffix}").write_bytes(compress(lines().encode()))
    train = load(make_config, tmp_path)["train"]
    assert read_all(train) == "".join(TEXTS[:2] + TEXTS).encode()
    assert train.document_starts.size == 5
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(TEXTS[0].encode())[:-6])
    with pytest.raises(ValueError, match=rf"a\.txt{suffix} is no whole {suffix} file"):
        load(make_config, tmp_path)


def test_a_line_or_a_row_is_a_document(make_config, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines() + "\n")
    table = pyarrow.table({"title": ["x", "y", "z"], "body": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    train = load(make_config, tmp_path / "a.jsonl")["train"]
    assert read_all(train) == "".join(TEXTS).encode() and train.document_starts.size == 3
    rows = load(make_config, tmp_path / "b.parquet", text_field="body")["train"]
    assert read_all(rows) == read_all(train)
    assert rows.document_starts.tolist() == train.document_starts.tolist()
    with pytest.raises(ValueError, match=r"b\.parquet: got 'text', it has \['title', 'body"):
        load(make_config, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="text in every line or row: line 1 of .* has None"):
        load(make_config, tmp_path / "a.jsonl", text_field="body")


def test_damaged_tables(make_config, tmp_path):
    (tmp_path / "a.jsonl").write_text(lines() + '{"text": "cut')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 4 is no JSON"):
        load(make_config, tmp_path / "a.jsonl")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and something else")
    with pytest.raises(ValueError, match=r"b\.parquet is no parquet file"):
        load(make_config, tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("caf\u00e9".encode("utf-16"), "UTF-16"),
        ("cafe".encode("utf-16-be"), "binary"),
        (b"\x89PNG\r\n\x1a\n\0\0", "binary"),
    ],
)
def test_what_is_no_text_is_refused_by_name(make_config, tmp_path, content, kind):
    (tmp_path / "good.txt").write_text("text")
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.txt is {kind}.*convert it to UTF-8"):
        load(make_config, tmp_path)
    (tmp_path / "bad.txt").unlink()
    (tmp_path / "worse.txt.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=rf"worse\.txt\.gz is {kind}"):
        load(make_config, tmp_path)


def test_a_folder_is_its_files_but_for_hidden_ones(make_config, tmp_path):
    for name in ("b/c.txt", "a.txt", ".git/x", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read_all(load(make_config, tmp_path)["train"]) == b"a.txtb/c.txt"
    assert read_all(load(make_config, tmp_path / "*.txt")["train"]) == b"a.txt"


def test_splits_may_have_files_of_their_own(make_config, tmp_path):
    for name in ("train", "valid", "test"):
        (tmp_path / name).write_text(name * 10)
    own = {"validation_files": (str(tmp_path / "valid"),), "test_fraction": 0.1}
    found = load(make_config, tmp_path / "train", **own)
    assert read_all(found["validation"]) == b"valid" * 10
    assert read_all(found["train"]) + read_all(found["test"]) == b"train" * 10
    found = load(make_config, tmp_path / "train", **own, test_files=(str(tmp_path / "test"),))
    assert read_all(found["train"]) == b"train" * 10 and read_all(found["test"]) == b"test" * 10
    with pytest.raises(FileNotFoundError, match=r"each entry of config\.data\.test_files"):
        load(make_config, tmp_path / "train", test_files=(str(tmp_path / "no"),))["test"]


def test_zst_without_the_package_says_what_to_do(make_config, tmp_path, monkeypatch):
    def missing(name):
        raise ImportError(name)

    (tmp_path / "a.zst").write_bytes(b"x")
    monkeypatch.setattr(text_files.importlib, "import_module", missing)
    with pytest.raises(ImportError, match="pip install zstandard"):
        load(make_config, tmp_path / "a.zst")


def test_text8_is_checked_and_cut(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(enwik8, "TEXT8_BYTES", (90, 5, 5))
    text = np.random.default_rng(0).choice(enwik8.TEXT8_CHARACTERS, 100).astype(np.uint8)
    config = make_config(name="text8", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"unpack text8\.zip"):
        data.load_source(config)
    text.tofile(tmp_path / "text8")
    found = data.load_source(config)
    assert [found[split].n_bytes for split in found] == [90, 5, 5]
    assert b"".join(read_all(found[split]) for split in found) == text.tobytes()
    (tmp_path / "text8").write_bytes(text.tobytes()[:-1] + b"A")
    with pytest.raises(ValueError, match="has the byte 65"):
        data.load_source(config)
    (tmp_path / "text8").write_bytes(b"a" * 99)
    with pytest.raises(ValueError, match="must have 100 bytes"):
        data.load_source(config)


def test_a_text_that_is_overwritten_is_noticed(make_config, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the old text " * 10)
    stream = load(make_config, path, test_fraction=0.2)["train"]
    require_unchanged = data.FilesUnchanged(stream)
    require_unchanged()
    with path.open("r+") as file:  # in place: what is mapped is another text now
        file.write("another one")
    os.utime(path, ns=(1, 1))
    with pytest.raises(ValueError, match=r"must not change while a run reads it: .*a\.txt"):
        require_unchanged()
    path.unlink()
    require_unchanged()
