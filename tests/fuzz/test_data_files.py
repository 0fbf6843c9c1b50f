"""Files of text and tokens: tokenizers, encoded text, archives, tables of books."""

import csv
import gzip
import hashlib
import io
import json
import struct
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import strategies as st

from longctx_jax.data import enwik8, hf_tokenizer, pg19, sentencepiece, token_cache
from longctx_jax.data.sentencepiece_training import train_model
from longctx_jax.data.streams import concatenate
from tests.data.test_hf_tokenizer import KINDS
from tests.fuzz import hostile

TEXT = b"It was the best of times, it was the worst of times, it was the age of wisdom. " * 30
WORDS = "the best of  times \u2581 \u00e9 12!"

pytestmark = pytest.mark.parametrize("n_examples", hostile.SIZES)


def use(make, path):
    """Reads a tokenizer and encodes with it; what it encodes it must decode."""
    tokenizer = make(path)
    assert tokenizer.decode(tokenizer.encode(WORDS)) == WORDS.encode()
    assert 0 <= tokenizer.separator_id < tokenizer.vocab_size


@pytest.fixture(scope="module")
def sentencepiece_model():
    return train_model(concatenate("tale", [TEXT]), vocab_size=300)


def test_sentencepiece_models(sentencepiece_model, tmp_path, n_examples):
    path = tmp_path / "x.model"

    def check(raw):
        path.write_bytes(raw)
        hostile.refused(lambda: use(sentencepiece.SentencePieceTokenizer, path), path)

    always = [sentencepiece_model.replace(b"<unk>", b"\xff\xfenk>")]
    strategy = hostile.damaged_bytes(sentencepiece_model) | st.binary()
    hostile.fuzz(n_examples, strategy, check, always)


def test_sentencepiece_pieces(sentencepiece_model, tmp_path, n_examples):
    """More pieces, of any kind, and another normaliser: fields of a message that follow merge."""
    path = tmp_path / "x.model"

    def message(field, content):
        size = len(content)
        assert size < 2**14
        length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
        return bytes([field << 3 | 2]) + length + content

    scores = st.floats(width=32).map(lambda x: b"\x15" + struct.pack("<f", x))
    kinds = st.integers(0, 127).map(lambda kind: bytes([0x18, kind]))
    names = st.binary(max_size=20) | st.text(max_size=9).map(lambda text: text.encode("utf-8"))
    names |= st.sampled_from([b"<0x41>", b"<0xZZ>", b"</s>", b"<unk>", b"", b"\xed\xa0\x80"])
    pieces = st.tuples(names, scores, kinds).map(
        lambda parts: message(1, message(1, parts[0]) + parts[1] + parts[2])
    )
    maps = st.binary(max_size=60).map(lambda raw: message(3, message(2, raw)))
    more = st.lists(pieces | maps, min_size=1, max_size=4).map(b"".join)

    def check(raw):
        path.write_bytes(sentencepiece_model + raw)
        hostile.refused(lambda: use(sentencepiece.SentencePieceTokenizer, path), path)

    hostile.fuzz(n_examples, more, check)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer_json(kind, tmp_path, n_examples):
    spec, _ = KINDS[kind]()
    path = tmp_path / "tokenizer.json"

    def check(raw):
        path.write_bytes(raw)
        hostile.refused(lambda: use(hf_tokenizer.HFTokenizer, path), path)

    panic = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    always = [json.dumps(spec | change).encode() for change in (panic, {"added_tokens": [{}]})]
    hostile.fuzz(n_examples, hostile.json_files(spec), check, always)


def test_tokenizer_config(tmp_path, n_examples):
    spec, _ = KINDS["fallback"]()
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    beside = tmp_path / "tokenizer_config.json"
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}

    def check(raw):
        beside.write_bytes(raw)
        hostile.refused(lambda: hf_tokenizer.HFTokenizer(path), "tokenizer_config.json")

    hostile.fuzz(max(n_examples // 4, 10), hostile.json_files(config), check)


KEY = {"name": "tale", "model": "abc"}
HEADER = {
    "format": token_cache.FORMAT,
    "key": KEY,
    "dtype": "uint16",
    "n_tokens": 4,
    "n_documents": 2,
}
BODY = np.array([3, 9, 4, 9], np.uint16).tobytes() + np.array([1, 3]).tobytes()


def cache_file(header, body):
    """A file whose checksum is right, whatever it holds."""
    text = json.dumps(header | {"crc32": zlib.crc32(body)}).encode()
    return text.ljust(token_cache.HEADER_BYTES) + body


def test_encoded_text(tmp_path, n_examples):
    path = tmp_path / "x.tokens"
    whole = cache_file(HEADER, BODY)
    headers = hostile.damaged_objects(HEADER).filter(lambda h: "crc32" not in h)
    contents = st.one_of(
        hostile.damaged_bytes(whole),
        st.tuples(headers, st.just(BODY)).map(lambda parts: cache_file(*parts)),
        st.tuples(headers, hostile.damaged_bytes(BODY)).map(lambda parts: cache_file(*parts)),
        hostile.damaged_bytes(BODY).map(lambda body: cache_file(HEADER, body)),
        st.sampled_from(hostile.TEXTS),
    )
    changes = [
        {"dtype": "O"},
        {"dtype": "float16"},
        {"n_tokens": 0},
        {"n_documents": -1},
        {"n_tokens": 1e400},
    ]
    always = [cache_file(HEADER | change, BODY) for change in changes]
    always += [cache_file(HEADER, BODY.replace(b"\x04\x00", b"\x0a\x00"))]
    not_rising = BODY[:8] + np.array([2, 1, 3]).tobytes()
    always += [cache_file(HEADER | {"n_documents": 3}, not_rising)]
    path.write_bytes(whole)
    assert token_cache._load(path, KEY, 10).separators.tolist() == [1, 3]

    def check(raw):
        path.write_bytes(raw)
        try:
            found = token_cache._load(path, KEY, 10)
        except token_cache.DamagedCacheError:
            return
        assert found.ids.size == 4 and found.ids.min() >= 0 and found.ids.max() < 10
        assert np.issubdtype(found.ids.dtype, np.integer)
        assert found.separators[-1] == 3 and np.all(np.diff(found.separators) > 0)

    hostile.fuzz(n_examples, contents, check, always)


def zipped(text, kind=zipfile.ZIP_DEFLATED, name="enwik8"):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        archive.writestr(name, text)
    return file.getvalue()


def encrypted(archive):
    """The same archive, which says that a password is needed."""
    raw = bytearray(archive)
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(signature) + offset] |= 1
    return bytes(raw)


@pytest.mark.parametrize("form", ["gz", "zip"])
def test_archives(form, tmp_path, monkeypatch, n_examples):
    """Never more is unpacked than the right file has, and nothing beside it is written."""
    text = TEXT[:2000]
    monkeypatch.setattr(enwik8, "ENWIK8_BYTES", len(text))
    monkeypatch.setattr(enwik8, "ENWIK8_MD5", hashlib.md5(text).hexdigest())
    path = tmp_path / f"enwik8.{form}"
    if form == "gz":
        seeds = [gzip.compress(text), gzip.compress(bytes(1 << 22))]
    else:
        seeds = [zipped(text), zipped(bytes(1 << 22)), zipped(text, zipfile.ZIP_LZMA)]
        seeds += [zipped(text, zipfile.ZIP_BZIP2), zipped(text, name="../enwik8")]
        seeds += [encrypted(seeds[0])]
    whole = st.sampled_from(seeds)

    path.write_bytes(seeds[1])
    with pytest.raises(ValueError, match=rf"has {enwik8.COPY_BYTES} \(too long\)"):
        enwik8._unpack(path)

    def check(raw):
        path.write_bytes(raw)
        if not hostile.refused(lambda: enwik8._unpack(path), path):
            assert (tmp_path / "enwik8").read_bytes() == text
            (tmp_path / "enwik8").unlink()
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    hostile.fuzz(n_examples, whole.flatmap(hostile.damaged_bytes) | st.binary(), check, seeds)


def test_a_note_of_a_check(tmp_path, monkeypatch, n_examples):
    monkeypatch.setattr(enwik8, "ENWIK8_BYTES", 4)
    monkeypatch.setattr(enwik8, "ENWIK8_MD5", hashlib.md5(b"text").hexdigest())
    path, note = tmp_path / "enwik8", tmp_path / "enwik8.verified.json"
    path.write_bytes(b"text")

    def check(raw):
        note.write_bytes(raw)
        enwik8._verify_once(path)

    hostile.fuzz(n_examples, hostile.json_files({"bytes": 4, "mtime_ns": 5, "md5": "x"}), check)


def test_tables_of_books(tmp_path, n_examples):
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["split", "book_id", "bytes", "sha256"])
    writer.writerows([["train", 1, 4, "ab"], ["test", 2, 9, "cd"]])
    raw = file.getvalue().encode()
    path = tmp_path / "metadata.csv"
    odd = [b"split\n" + b"x" * 200_000, b'split,book_id\ntrain,"', raw.replace(b"4", b"9" * 5000)]
    odd += [raw.replace(b"1", "\u00b2".encode()), raw.replace(b"train,1,4,ab", b"train")]

    def check(raw):
        path.write_bytes(raw)
        if not hostile.refused(lambda: pg19._read_table(path, "train"), path):
            assert all(type(n) is int for n in pg19._read_table(path, "train"))

    hostile.fuzz(n_examples, hostile.damaged_bytes(raw), check, odd)


def test_names_of_books(tmp_path, n_examples):
    names = st.text(max_size=20) | st.sampled_from(["1", "01", "\u00b2", "\u0663", "-1", "1e3", ""])

    def check(name):
        folder = tmp_path / hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        folder.mkdir(exist_ok=True)
        try:
            (folder / f"{name}.txt").write_text("a book")
        except (OSError, ValueError):  # no name of a file
            return
        hostile.refused(lambda: pg19._list_books("pg19", folder), folder)

    hostile.fuzz(n_examples, names, check)
