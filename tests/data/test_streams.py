import concurrent.futures

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longctx_jax.data import streams


def write_files(folder, documents):
    paths = []
    for index, document in enumerate(documents):
        paths.append(folder / f"{index}.txt")
        paths[-1].write_bytes(document)
    return paths


DOCUMENTS = [b"a", b"bcd", b"\xc3\xa9", b"efghij" * 7]


@pytest.fixture(params=["array", "files", "slice"])
def form(request, tmp_path):
    """Returns the same documents as each kind of stream."""
    if request.param == "array":
        return streams.concatenate("s", DOCUMENTS)
    if request.param == "files":
        return streams.FileStream("s", write_files(tmp_path, DOCUMENTS), check_utf8=True)
    whole = streams.concatenate("s", [b"xyz", b"u" + DOCUMENTS[0], *DOCUMENTS[1:-1], b""])
    tail = streams.concatenate("s", [whole.read(0, whole.n_bytes).tobytes()[:4], *DOCUMENTS, b"q"])
    return streams.SliceStream("s", tail, 4, tail.n_bytes - 1)


def test_every_form_reads_the_same_bytes(form):
    text = b"".join(DOCUMENTS)
    assert form.n_bytes == len(text)
    for start in range(len(text) + 1):
        for stop in range(start, len(text) + 1):
            piece = form.read(start, stop)
            assert piece.dtype == np.uint8 and piece.tobytes() == text[start:stop]


def test_every_form_knows_its_documents(form):
    assert form.document_starts.dtype == np.int64
    assert form.document_starts.tolist() == [0, 1, 4, 6]
    index = form.document_index(np.arange(form.n_bytes))
    assert index.tolist() == [0, 1, 1, 1, 2, 2] + [3] * 42


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2), (0, 49)], ids=str)
def test_reading_outside_is_an_error(form, bounds):
    with pytest.raises(IndexError, match="48 bytes"):
        form.read(*bounds)


def test_a_stream_is_immutable(form):
    with pytest.raises(ValueError, match="read-only"):
        form.document_starts[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        form.read(1, 4)[0] = 1


def test_slice_cuts_the_first_and_last_document():
    whole = streams.concatenate("s", [b"abc", b"def", b"ghi"])
    part = streams.SliceStream("p", whole, 1, 8)
    assert part.document_starts.tolist() == [0, 2, 5]
    assert part.read(0, 7).tobytes() == b"bcdefgh"
    assert streams.SliceStream("p", whole, 3, 6).document_starts.tolist() == [0]


def test_map_file_takes_a_byte_range(tmp_path):
    (tmp_path / "f").write_bytes(b"0123456789")
    assert streams.map_file("s", tmp_path / "f", 2, 5).read(0, 3).tobytes() == b"234"
    assert streams.map_file("s", tmp_path / "f").n_bytes == 10


def test_open_maps_are_bounded_and_threads_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "OPEN_FILES", 3)
    documents = [bytes([65 + i]) * (i + 1) for i in range(26)]
    stream = streams.FileStream("s", write_files(tmp_path, documents), check_utf8=True)
    text = b"".join(documents)
    ranges = np.sort(np.random.default_rng(0).integers(0, len(text), (200, 2)), axis=1).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        pieces = list(pool.map(lambda r: stream.read(*r).tobytes(), ranges))
    assert pieces == [text[a:b] for a, b in ranges]
    assert len(stream._maps) == 3


@pytest.mark.parametrize("check_all", [True, False])
def test_a_book_that_is_not_utf8_is_named(tmp_path, monkeypatch, check_all):
    monkeypatch.setattr(streams, "CHECK_ALL_MAX_BYTES", 100 if check_all else 0)
    paths = write_files(tmp_path, [b"fine", b"caf\xe9 au lait"])

    def use():
        stream = streams.FileStream("s", paths, check_utf8=True)
        assert stream.read(0, 4).tobytes() == b"fine"
        assert not check_all, "a small stream must be checked when built"
        stream.read(3, 5)

    with pytest.raises(ValueError, match=r"1\.txt has byte 0xe9 at offset 3 .*iconv"):
        use()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40), chunk=st.integers(4, 9), data=st.data())
def test_utf8_check_does_not_depend_on_chunks(monkeypatch, text, chunk, data):
    monkeypatch.setattr(streams, "UTF8_CHUNK_BYTES", chunk)
    raw = text.encode()
    streams.require_utf8(np.frombuffer(raw, np.uint8), "f")
    at = data.draw(st.integers(0, len(raw)))
    bad = raw[:at] + b"\xff" + raw[at:]
    expected = None
    try:
        bad.decode()
    except UnicodeDecodeError as error:
        expected = error.start
    with pytest.raises(ValueError, match=f"at offset {expected} "):
        streams.require_utf8(np.frombuffer(bad, np.uint8), "f")


def test_utf8_check_sees_a_character_cut_by_the_end():
    with pytest.raises(ValueError, match="offset 1 "):
        streams.require_utf8(np.frombuffer(b"a\xe2\x82", np.uint8), "f")


def test_an_empty_document_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"1\.txt is empty"):
        streams.FileStream("s", write_files(tmp_path, [b"a", b""]))


def test_a_file_that_changes_is_named(tmp_path):
    paths = write_files(tmp_path, [b"abc", b"def"])
    stream = streams.FileStream("s", paths)
    paths[1].write_bytes(b"defg")
    with pytest.raises(ValueError, match=r"1\.txt had 3 bytes and now has 4"):
        stream.read(0, 6)


@pytest.mark.parametrize("starts", [(1,), (0, 0), (0, 2, 1), (0, 3), ()], ids=str)
def test_wrong_document_starts_are_refused(starts):
    with pytest.raises(ValueError, match="document_starts"):
        streams.ArrayStream("s", np.zeros(3, np.uint8), starts)


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="at least one byte"):
        streams.ArrayStream("s", np.zeros(0, np.uint8))
    with pytest.raises(TypeError, match="uint8"):
        streams.ArrayStream("s", np.zeros(3, np.int32))


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 1000])
def test_a_document_begins_a_word(piece_bytes):
    stream = streams.concatenate("s", [b"the end", b"the start", b" a", b"b"])
    assert streams.count_words(stream, piece_bytes=piece_bytes) == 6
    found = [streams.count_words(stream, n, piece_bytes=piece_bytes) for n in (7, 8, 16, 18, 19)]
    assert found == [2, 3, 4, 5, 6]
