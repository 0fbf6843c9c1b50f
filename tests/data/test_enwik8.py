import gzip
import hashlib
import json
import os
import zipfile

import numpy as np
import pytest

from longctx_jax import data
from longctx_jax.data import enwik8, files

TEXT = np.random.default_rng(0).integers(97, 123, 2000, np.uint8).tobytes()


@pytest.fixture
def small(monkeypatch):
    """Makes `TEXT` the right enwik8, split 1800/100/100, and the network unreachable."""
    monkeypatch.setattr(enwik8, "ENWIK8_BYTES", 2000)
    monkeypatch.setattr(enwik8, "ENWIK8_MD5", hashlib.md5(TEXT).hexdigest())
    monkeypatch.setattr(enwik8, "ENWIK8_TRAIN_BYTES", 1800)
    monkeypatch.setattr(enwik8, "ENWIK8_VALIDATION_BYTES", 100)
    monkeypatch.setattr(enwik8, "ENWIK8_TEST_BYTES", 100)
    monkeypatch.setattr(enwik8, "ENWIK8_URL", "file:///nowhere/enwik8.zip")


@pytest.fixture
def load(small, make_config, tmp_path):
    def load(**fields):
        return data.load_source(make_config(name="enwik8", data_dir=str(tmp_path), **fields))

    return load


def write_zip(path, text=TEXT, member="enwik8"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, text)


def assert_is_enwik8(splits):
    texts = [splits[split].read(0, splits[split].n_bytes).tobytes() for split in splits]
    assert texts == [TEXT[:1800], TEXT[1800:1900], TEXT[1900:]]
    assert splits["train"].document_starts.tolist() == [0]
    assert splits["test"].name == "enwik8/test"


def test_published_constants():
    sizes = enwik8.ENWIK8_TRAIN_BYTES, enwik8.ENWIK8_VALIDATION_BYTES, enwik8.ENWIK8_TEST_BYTES
    assert sizes == (90_000_000, 5_000_000, 5_000_000)
    assert sum(sizes) == enwik8.ENWIK8_BYTES
    sizes = (
        enwik8.ENWIK8_4M_TRAIN_BYTES,
        enwik8.ENWIK8_4M_VALIDATION_BYTES,
        enwik8.ENWIK8_4M_TEST_BYTES,
    )
    assert sizes == (3_600_000, 200_000, 200_000)
    assert sum(sizes) == enwik8.ENWIK8_4M_BYTES


@pytest.mark.parametrize("folder", ["", "enwik8"], ids=["data_dir", "subfolder"])
@pytest.mark.parametrize("form", ["raw", "gz", "zip"])
def test_found_in_every_form(load, tmp_path, folder, form):
    place = tmp_path / folder
    place.mkdir(exist_ok=True)
    if form == "raw":
        (place / "enwik8").write_bytes(TEXT)
    elif form == "gz":
        (place / "enwik8.gz").write_bytes(gzip.compress(TEXT))
    else:
        write_zip(place / "enwik8.zip")
    assert_is_enwik8(load())
    assert (place / "enwik8").read_bytes() == TEXT
    names = {path.name for path in place.iterdir()} - {"enwik8.gz", "enwik8.zip"}
    assert names == {"enwik8", "enwik8.verified.json"}, "no temporary file may stay"


def test_archive_beside_a_folder_of_that_name(load, tmp_path):
    (tmp_path / "enwik8").mkdir()
    write_zip(tmp_path / "enwik8.zip")
    assert_is_enwik8(load())
    assert (tmp_path / "enwik8" / "enwik8").read_bytes() == TEXT


def test_second_load_trusts_the_note_until_the_file_changes(load, tmp_path, monkeypatch):
    path = tmp_path / "enwik8"
    path.write_bytes(TEXT)
    checks = []
    check = enwik8._require
    monkeypatch.setattr(enwik8, "_require", lambda *a: (checks.append(a), check(*a)))
    load(), load()
    assert len(checks) == 1
    facts = json.loads((tmp_path / "enwik8.verified.json").read_text())
    assert set(facts) == {"bytes", "mtime_ns", "md5"}
    path.write_bytes(b"X" + TEXT[1:])
    os.utime(path, ns=(0, facts["mtime_ns"] + 1))
    with pytest.raises(ValueError, match="md5"):
        load()
    path.write_bytes(TEXT)
    (tmp_path / "enwik8.verified.json").write_text("not json")
    assert_is_enwik8(load())


def test_truncated_file_names_sizes(make_config, tmp_path):
    with (tmp_path / "enwik8").open("wb") as file:
        file.truncate(99_999_999)  # sparse
    with pytest.raises(
        ValueError, match="must have 100000000 bytes: .*enwik8 has 99999999 .truncated.*delete"
    ):
        data.load_source(make_config(name="enwik8", data_dir=str(tmp_path)))


def test_wrong_file_names_both_digests(load, tmp_path):
    wrong = TEXT[:-1] + b"?"
    (tmp_path / "enwik8").write_bytes(wrong)
    found, expected = (hashlib.md5(text).hexdigest() for text in (wrong, TEXT))
    with pytest.raises(ValueError, match=f"must have md5 {expected}: .* has {found}; .*delete it"):
        load()


@pytest.mark.parametrize("text", [TEXT[:-1], TEXT + b"?" * 5_000_000, b"?" * 2000], ids=len)
def test_archive_of_another_text_leaves_nothing(load, tmp_path, text):
    write_zip(tmp_path / "enwik8.zip", text)
    with pytest.raises(ValueError, match=r"enwik8 must have .*the content of .*enwik8\.zip has"):
        load()
    assert [path.name for path in tmp_path.iterdir()] == ["enwik8.zip"]


@pytest.mark.parametrize("form", ["gz", "zip"])
@pytest.mark.parametrize("damage", ["cut", "not_an_archive"])
def test_damaged_archive_is_named(load, tmp_path, form, damage):
    path = tmp_path / f"enwik8.{form}"
    if form == "gz":
        path.write_bytes(gzip.compress(TEXT))
    else:
        write_zip(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"<html>" * 50)
    with pytest.raises(ValueError, match=rf"enwik8\.{form} must be a whole archive .*delete"):
        load()
    assert [path.name for path in tmp_path.iterdir()] == [f"enwik8.{form}"]


def test_archive_without_the_member(load, tmp_path):
    write_zip(tmp_path / "enwik8.zip", member="other")
    with pytest.raises(ValueError, match="whole archive of enwik8"):
        load()


def test_folder_that_cannot_be_written_is_named(load, tmp_path, monkeypatch):
    write_zip(tmp_path / "enwik8.zip")

    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied", kwargs["dir"])

    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    with pytest.raises(
        PermissionError, match=r"unpack it elsewhere and set config\.data\.data_dir"
    ):
        load()
    (tmp_path / "enwik8").write_bytes(TEXT)
    assert_is_enwik8(load())  # works without its note


def test_missing_without_download_says_what_to_put_where(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.data\.download is False.*put it at") as e:
        load(download=False)
    assert str(tmp_path / "enwik8.zip") in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_failed_download_says_what_to_put_where(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"downloading file.* failed \(URLError.*put it at"):
        load(download=True)
    assert list(tmp_path.iterdir()) == []


def test_download_unpacks(load, tmp_path, monkeypatch):
    served = tmp_path / "served.zip"
    write_zip(served)
    monkeypatch.setattr(enwik8, "ENWIK8_URL", served.as_uri())
    monkeypatch.setattr(enwik8, "COPY_BYTES", 100)
    assert_is_enwik8(load(download=True))
    assert (tmp_path / "enwik8.zip").read_bytes() == served.read_bytes()


def test_short_download_is_not_kept(load, tmp_path, monkeypatch):
    class Response:
        headers = {"Content-Length": "1000"}
        chunks = [b"x" * 400, b""]

        def read(self, n):
            return self.chunks.pop(0)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            return None

    monkeypatch.setattr(enwik8.urllib.request, "urlopen", lambda url, timeout: Response())
    with pytest.raises(FileNotFoundError, match="ended after 400 of 1000 bytes"):
        load(download=True)
    assert list(tmp_path.iterdir()) == []


# enwik8_4m


def test_prefix_missing_or_wrong(make_config, tmp_path):
    config = make_config(name="enwik8_4m", data_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="head -c 4000000 enwik8"):
        data.load_source(config)
    (tmp_path / "enwik8_4m").mkdir()
    (tmp_path / "enwik8_4m" / "enwik8_4m").write_bytes(b"x")
    with pytest.raises(ValueError, match="must have 4000000 bytes: .* has 1 "):
        data.load_source(config)
    (tmp_path / "enwik8_4m" / "enwik8_4m").write_bytes(bytes(4_000_000))
    with pytest.raises(ValueError, match=f"must have sha256 {enwik8.ENWIK8_4M_SHA256}"):
        data.load_source(config)


def test_real_prefix(make_config, real_data_dir):
    if not (real_data_dir / "enwik8_4m").exists():
        pytest.skip(f"no enwik8_4m in {real_data_dir}")
    found = data.load_source(make_config(name="enwik8_4m", data_dir=str(real_data_dir)))
    assert [found[split].n_bytes for split in found] == [3_600_000, 200_000, 200_000]
    assert [found[split].name for split in found] == [f"enwik8_4m/{split}" for split in found]
    assert found["train"].read(0, 10).tobytes() == b"<mediawiki"
    raw = next(p for p in (real_data_dir / "enwik8_4m").rglob("enwik8_4m")).read_bytes()
    assert found["validation"].read(0, 200_000).tobytes() == raw[3_600_000:3_800_000]
    assert found["test"].read(199_990, 200_000).tobytes() == raw[-10:]
