import csv
import hashlib
import logging

import pytest

from longctx_jax import data
from longctx_jax.data import pg19

BOOKS = {"train": {9: b"nine", 100: b"hundred\n", 20: b"twenty"}, "validation": {3: b"three"}}
BOOKS["test"] = {7: "é".encode()}


def write_books(root, books=BOOKS):
    for split, texts in books.items():
        (root / split).mkdir(parents=True)
        for book_id, text in texts.items():
            (root / split / f"{book_id}.txt").write_bytes(text)


def write_table(root, books=BOOKS, **changes):
    with (root / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["split", "book_id", "bytes", "words", "sha256", "title", "year"])
        for split, texts in books.items():
            for book_id, text in texts.items():
                size = changes.get("bytes", len(text))
                digest = changes.get("sha256", hashlib.sha256(text).hexdigest())
                writer.writerow([split, book_id, size, 1, digest, "a, b", 1900])


@pytest.fixture
def load(make_config, tmp_path):
    return lambda name: data.load_source(make_config(name=name, data_dir=str(tmp_path)))


@pytest.mark.parametrize("name", ["pg19", "pg19_mini"])
@pytest.mark.parametrize("inside", [True, False])
def test_books_are_documents_in_order_of_id(load, tmp_path, name, inside):
    write_books(tmp_path / name if inside else tmp_path)
    found = load(name)
    train = found["train"]
    assert train.read(0, train.n_bytes).tobytes() == b"ninetwentyhundred\n"
    assert train.document_starts.tolist() == [0, 4, 10]
    assert found["test"].n_bytes == 2 and found["test"].name == f"{name}/test"


def test_other_counts_are_not_pg19(load, tmp_path, caplog, monkeypatch):
    write_books(tmp_path)
    logger = logging.getLogger("absl")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger="absl"):
        load("pg19_mini")
        assert not caplog.records
        monkeypatch.setattr(pg19, "PG19_BOOKS", {"train": 3, "validation": 1, "test": 1})
        load("pg19")
        assert not caplog.records
        monkeypatch.setattr(pg19, "PG19_BOOKS", {"train": 28_602, "validation": 50, "test": 100})
        load("pg19")
    assert "not PG-19 results" in caplog.text and "28602" in caplog.text


def test_nothing_there(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.data\.data_dir"):
        load("pg19")


def test_missing_split_folder_is_named(load, tmp_path):
    write_books(tmp_path, {"train": BOOKS["train"], "test": BOOKS["test"]})
    with pytest.raises(FileNotFoundError, match="validation is missing"):
        load("pg19")


def test_folder_without_books_is_named(load, tmp_path):
    write_books(tmp_path, BOOKS | {"test": {}})
    (tmp_path / "test" / "README").write_text("x")
    with pytest.raises(FileNotFoundError, match="test has none"):
        load("pg19")


def test_name_that_is_no_id_is_named(load, tmp_path):
    write_books(tmp_path)
    (tmp_path / "train" / "moby.txt").write_text("x")
    with pytest.raises(ValueError, match=r"integer id.*moby\.txt"):
        load("pg19")


@pytest.mark.parametrize("name", ["pg19", "pg19_mini"])
def test_book_that_is_not_utf8_is_named(load, tmp_path, name):
    write_books(tmp_path, BOOKS | {"validation": {5: b"ab\xe9"}})
    with pytest.raises(ValueError, match=r"5\.txt has byte 0xe9 at offset 2"):
        load(name)["validation"]


def test_mini_is_checked_against_its_table(load, tmp_path):
    write_books(tmp_path)
    write_table(tmp_path)
    assert load("pg19_mini")["train"].n_bytes == 18
    write_table(tmp_path, bytes=5)
    with pytest.raises(ValueError, match=r"9\.txt must have 5 bytes by metadata\.csv: it has 4"):
        load("pg19_mini")["train"]
    write_table(tmp_path, sha256="ab" * 32)
    with pytest.raises(ValueError, match=r"9\.txt must have sha256 abab"):
        load("pg19_mini")["train"]
    write_table(tmp_path, BOOKS | {"train": {9: b"nine", 20: b"twenty", 21: b"x"}})
    with pytest.raises(ValueError, match=r"missing ids \[21\], unlisted ids \[100\]"):
        load("pg19_mini")["train"]


def test_real_books(make_config, real_data_dir):
    if not (real_data_dir / "pg19_mini").is_dir():
        pytest.skip(f"no pg19_mini in {real_data_dir}")
    found = data.load_source(make_config(name="pg19_mini", data_dir=str(real_data_dir)))
    sizes = {split: found[split].n_bytes for split in found}
    assert sizes == {"train": 32_038_408, "validation": 1_890_752, "test": 2_123_436}
    assert [found[split].document_starts.size for split in found] == [26, 4, 4]
    alice = (real_data_dir / "pg19_mini" / "train" / "11.txt").read_bytes()
    assert found["train"].read(0, len(alice)).tobytes() == alice
    second = (real_data_dir / "pg19_mini" / "test" / "98.txt").read_bytes()
    start = int(found["test"].document_starts[1])  # ids 84, 98, 120, 1661: by number, not by name
    assert found["test"].read(start, start + len(second)).tobytes() == second
