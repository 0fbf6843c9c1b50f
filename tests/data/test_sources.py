import pathlib
import time

import numpy as np
import pytest

from longctx_jax import data
from longctx_jax.data import sources, splits


def read_all(stream):
    return stream.read(0, stream.n_bytes).tobytes()


def test_unknown_name_lists_the_known(make_config):
    with pytest.raises(ValueError, match=r"config\.data\.name must be one of .*pg19_tfds.*'wiki'"):
        data.load_source(make_config(name="wiki"))


def test_unknown_split_lists_the_known(make_config, tmp_path):
    (tmp_path / "f").write_bytes(b"x" * 100)
    found = data.load_source(make_config(files=(str(tmp_path / "f"),)))
    assert list(found) == ["train", "validation", "test"] and len(found) == 3
    assert "test" in found and "valid" not in found
    with pytest.raises(ValueError, match=r"'validation'.*got 'valid'; change config\.eval\.split"):
        found["valid"]


def test_data_dir_resolution(monkeypatch, tmp_path):
    home = pathlib.Path("~/data").expanduser()
    assert splits.resolve_data_dir("") == home
    assert "default" in splits.where_from("")
    monkeypatch.setenv("LONGCTX_DATA_DIR", str(tmp_path))
    assert splits.resolve_data_dir("") == tmp_path
    assert "$LONGCTX_DATA_DIR" in splits.where_from("")
    assert splits.resolve_data_dir("~/elsewhere") == home.parent / "elsewhere"
    assert splits.where_from("x") == "config.data.data_dir"


# text


def test_text_is_split_by_bytes_in_sorted_order(make_config, tmp_path):
    for name, size in (("b", 50), ("a", 30), ("c", 20), ("empty", 0)):
        (tmp_path / f"{name}.txt").write_bytes(name[0].encode() * size)
    config = make_config(
        files=(str(tmp_path / "b.txt"), str(tmp_path / "*.txt")),
        validation_fraction=0.1,
        test_fraction=0.05,
    )
    found = data.load_source(config)
    assert read_all(found["train"]) == b"a" * 30 + b"b" * 50 + b"c" * 5
    assert read_all(found["validation"]) == b"c" * 10
    assert read_all(found["test"]) == b"c" * 5
    assert found["train"].document_starts.tolist() == [0, 30, 80]
    assert found["test"].name == "text/test"


def test_text_expands_home_and_takes_any_bytes(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "odd[1].bin").write_bytes(b"\xff" * 40)
    found = data.load_source(make_config(files=("~/odd[1].bin",)))
    assert [found[split].n_bytes for split in found] == [36, 2, 2]


def test_text_without_a_match_names_the_pattern(make_config, tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    pattern = str(tmp_path / "*.md")
    with pytest.raises(FileNotFoundError, match=r"config\.data\.files.*\*\.md"):
        data.load_source(make_config(files=(str(tmp_path / "a"), pattern)))


@pytest.mark.parametrize(
    ("files", "error", "match"),
    [
        ((), ValueError, r"needs config\.data\.files"),
        ("a.txt", TypeError, r"config\.data\.files must be a tuple"),
    ],
    ids=["none", "string"],
)
def test_text_needs_files(make_config, files, error, match):
    with pytest.raises(error, match=match):
        data.load_source(make_config(files=files))


def test_text_of_empty_files_is_refused(make_config, tmp_path):
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ValueError, match=r"config\.data\.files must hold text"):
        data.load_source(make_config(files=(str(tmp_path / "a"),)))


@pytest.mark.parametrize(
    "fractions", [(-0.1, 0.1), (0.1, 1.0), (0.5, 0.5), (float("nan"), 0.1)], ids=str
)
def test_text_fractions_are_checked(make_config, tmp_path, fractions):
    (tmp_path / "a").write_bytes(b"x" * 10)
    with pytest.raises(ValueError, match=r"config\.data\.(validation|test)_fraction"):
        data.load_source(
            make_config(
                files=(str(tmp_path / "a"),),
                validation_fraction=fractions[0],
                test_fraction=fractions[1],
            )
        )


def test_text_with_an_empty_split_fails_only_when_it_is_used(make_config, tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    found = data.load_source(make_config(files=(str(tmp_path / "a"),), test_fraction=0.0))
    assert found["train"].n_bytes == 10
    with pytest.raises(ValueError, match=r"the test split of config\.data\.files"):
        found["test"]


# python_source


@pytest.fixture(scope="module")
def python_source():
    return sources.load_python_source(None)


def test_python_source_is_real_text_of_known_size(python_source):
    sizes = {split: python_source[split].n_bytes for split in python_source}
    total = sum(sizes.values())
    assert 10_000_000 <= total <= sources.PYTHON_SOURCE_MAX_BYTES
    assert 0.8 < sizes["train"] / total < 0.95
    for split in python_source:
        assert b"\ndef " in read_all(python_source[split])
        read_all(python_source[split]).decode("utf-8")


def test_python_source_is_deterministic_and_quick(python_source):
    started = time.monotonic()
    again = sources.load_python_source(None)
    streams = {split: again[split] for split in again}
    assert time.monotonic() - started < 10  # 0.6 s observed on an idle machine
    for split, stream in streams.items():
        assert read_all(stream) == read_all(python_source[split])
        assert np.array_equal(stream.document_starts, python_source[split].document_starts)


def test_python_source_splits_are_disjoint_by_file(monkeypatch):
    root = pathlib.Path(sources.sysconfig.get_paths()["stdlib"])
    files = sources._read_python_files(root)
    assert "os.py" in files and list(files) == sorted(files)
    for part in ("site-packages", "dist-packages", "__pycache__"):
        assert not any(part in path for path in files)
    found = sources.load_python_source(None)
    n_documents = {split: found[split].document_starts.size for split in found}
    by_split = {split: [p for p in files if sources._python_split(p) == split] for split in found}
    assert {split: len(paths) for split, paths in by_split.items()} == n_documents
    for split, paths in by_split.items():
        assert read_all(found[split]) == b"".join(files[path] for path in paths)


def test_python_source_cap_is_deterministic(monkeypatch, tmp_path):
    for index in range(40):
        (tmp_path / f"m{index:02}.py").write_bytes(b"x = 1\n" * 10)
    (tmp_path / "bad_syntax.py").write_bytes(b"x" * 60)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_bytes(b"y")
    whole = sources._read_python_files(tmp_path)
    assert list(whole) == [f"m{index:02}.py" for index in range(40)]
    monkeypatch.setattr(sources, "PYTHON_SOURCE_MAX_BYTES", 1230)
    kept = sources._read_python_files(tmp_path)
    assert len(kept) == 20 and list(kept) == sorted(kept)
    assert max(kept) > "m20.py", "the cap must not cut the end of the alphabet"
    assert sources._read_python_files(tmp_path) == kept


def test_python_source_of_a_bare_python_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"found 0 under .*config\.data\.name='text'"):
        sources.load_python_source(None)


def test_split_of_a_path_never_changes():
    paths = ("os.py", "json/decoder.py", "json/__init__.py", "timeit.py", "secrets.py", "bz2.py")
    expected = ["train"] * 2 + ["validation"] * 2 + ["test"] * 2
    assert [sources._python_split(path) for path in paths] == expected
