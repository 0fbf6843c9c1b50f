import logging
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longctx_jax import data
from longctx_jax.data import files, sentencepiece, subwords, token_cache
from longctx_jax.data.sentencepiece_training import train_model
from longctx_jax.data.streams import concatenate

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the "
    "age of foolishness.\n\n    We had everything before us, we had nothing before us.\n" * 40
)
ODD = [
    "",
    " ",
    "  two  spaces  ",
    "\n\t\r\n \x0b\x0c",
    "\u2581",
    " \u2581\u2581 a\u2581b ",
    "\u2585\u2047 <unk> </s> <pad> <0x41> \x00\x01\x7f\x85",
    "ﬁ ² Å e\u0301 \u00a0\u3000\ufeff\ufffd\uffff",
    "👩\u200d👩\u200d👧 日本語のテキスト עברית",
    b"caf\xe9 \xff\xfe\xe2\x96 \xed\xa0\x80",
]
DOCUMENTS = [b"It was the age.\n", b"x", "best of  times \u2581 é👧".encode(), b" ", b"was \xe9"]


def train(**changes):
    stream = concatenate("tale", [TEXT.encode()])
    return train_model(stream, **({"vocab_size": 340} | changes))


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tale.model"
    path.write_bytes(train())
    return path


@pytest.fixture(scope="module")
def pieces(model_file):
    """Returns the tokenizer of the tiny model."""
    return data.build_tokenizer(str(model_file))


@pytest.fixture
def own_file(model_file, tmp_path):
    """Returns a copy of the model in a folder without a cache."""
    path = tmp_path / "own.model"
    path.write_bytes(model_file.read_bytes())
    return path


def fresh(path):
    return sentencepiece.SentencePieceTokenizer(path)


# exactness


def raw_texts():
    characters = st.one_of(
        st.characters(exclude_categories=("Cs",)), st.sampled_from(" \n\u2581ae")
    )
    return st.one_of(st.text(characters).map(str.encode), st.binary())


@settings(max_examples=200, deadline=None)
@given(raw_texts())
@example("".join(part for part in ODD if isinstance(part, str)).encode())
def test_any_bytes_round_trip(pieces, raw):
    ids = pieces.encode(raw)
    assert ids.dtype == np.int32
    assert pieces.decode(ids) == raw
    counts = pieces.token_bytes(ids)
    assert counts.dtype == np.int64 and counts.sum() == len(raw)
    assert [len(pieces.decode(ids[i : i + 1])) for i in range(ids.size)] == counts.tolist()


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_text_round_trips(pieces, text):
    raw = text.encode() if isinstance(text, str) else text
    assert pieces.decode(pieces.encode(text)) == raw


def test_sub_words_are_shorter_than_bytes(pieces):
    ids = pieces.encode(TEXT)
    assert ids.size < len(TEXT) / 3 and ids.max() < pieces.vocab_size == 340
    assert pieces.separator_id == pieces.start_id == 1 and pieces.separator_id not in ids
    assert pieces.decode(np.array([0, 1, 2])) == b"" and pieces.token_bytes(1) == 0


@pytest.mark.parametrize("chunk", [5, 16, 100])
def test_cutting_changes_no_token(pieces, monkeypatch, chunk):
    whole = pieces.encode(TEXT)
    monkeypatch.setattr(subwords, "CHUNK_BYTES", 100 * chunk)
    assert pieces.encode(TEXT).tolist() == whole.tolist()


@settings(max_examples=100, deadline=None)
@given(raw_texts(), st.integers(1, 9))
def test_pieces_cover_the_text(raw, size):
    bounds = list(subwords.cut_at_spaces(raw, size))
    assert b"".join(raw[a:b] for a, b in bounds) == raw
    assert all(0 < b - a <= size for a, b in bounds)


def test_cuts_come_before_spaces_else_between_characters():
    def cut(text, size):
        raw = text.encode()
        return [raw[a:b].decode() for a, b in subwords.cut_at_spaces(raw, size)]

    assert cut("ab  cd ef", 6) == ["ab", "  cd", " ef"]
    assert cut("éééé", 3) == ["é"] * 4


# a stream


@pytest.mark.parametrize("block", [1 << 22, 7])
def test_documents_are_encoded_apart_and_separated(own_file, monkeypatch, block):
    monkeypatch.setattr(subwords, "BLOCK_BYTES", block)
    tokenizer = fresh(own_file)
    tokens = data.tokenize(concatenate("s", DOCUMENTS), tokenizer)
    ids = tokens.read(0, tokens.n_tokens)
    assert ids.dtype == np.int32
    ends = np.flatnonzero(ids == tokenizer.separator_id)
    assert ends.size == tokens.n_documents == len(DOCUMENTS) and ends[-1] == ids.size - 1
    split = np.split(ids, ends + 1)[:-1]
    assert [tokenizer.decode(part) for part in split] == DOCUMENTS
    if block > 100:
        assert [part[:-1].tolist() for part in split] == [
            tokenizer.encode(document).tolist() for document in DOCUMENTS
        ]
    assert (tokens.name, tokens.sample_len, tokens.tokenizer) == ("s", 0, tokenizer)
    with pytest.raises(IndexError, match=f"{ids.size} tokens"):
        tokens.read(0, ids.size + 1)


def test_places_agree_with_counting(own_file):
    tokenizer = fresh(own_file)
    stream = concatenate("s", DOCUMENTS)
    tokens = data.tokenize(stream, tokenizer)
    ids = tokens.read(0, tokens.n_tokens)
    offsets = np.cumsum([0, *tokenizer.token_bytes(ids)])
    assert [tokens.byte_offset(i) for i in range(ids.size + 1)] == offsets.tolist()
    assert tokens.byte_offset(ids.size) == stream.n_bytes
    for n_bytes in range(stream.n_bytes + 2):
        assert tokens.tokens_within(n_bytes) == int(np.sum(offsets[1:] <= n_bytes))
    # As an input a separator begins the next document.
    expected = np.cumsum(ids == tokenizer.separator_id)
    assert tokens.document_index(np.arange(ids.size)).tolist() == expected.tolist()


def test_training_rows_reset_at_separators(own_file):
    tokenizer = fresh(own_file)
    stream = concatenate("s", DOCUMENTS)
    tokens = data.tokenize(stream, tokenizer)
    sizes = {"seq_len": 8, "global_batch_size": 1, "seed": 0, "order": "stripes"}
    dataset = data.make_dataset(stream, tokenizer, vocab_size=340, **sizes)
    batches = [dataset[step] for step in range(20)]
    inputs, segments = (
        np.concatenate([batch[field][0] for batch in batches])
        for field in ("tokens", "segment_ids")
    )
    first = inputs[1:] == tokenizer.separator_id
    assert (np.diff(segments) == first).all(), "each separator begins a document, laps included"
    assert first.sum() > 2 * tokens.n_documents
    assert all((batch["weights"] == 1).all() for batch in batches)
    words = data.position_of(stream, tokenizer, 3, **sizes).split()
    offset = int(dict(word.split("=") for word in words)["byte_offset"])
    here = tokenizer.decode(batches[3]["tokens"][0])
    assert (stream.read(0, stream.n_bytes).tobytes() * 2)[offset:].startswith(here)


# the file of encoded text


def cache_files(path):
    return sorted(path.with_name(f"{path.name}.tokens").iterdir())


def ids_of(path, documents=DOCUMENTS, name="a/b"):
    tokens = data.tokenize(concatenate(name, documents), fresh(path))
    return tokens.read(0, tokens.n_tokens).tolist()


def test_the_second_run_does_not_encode(own_file, monkeypatch):
    expected = ids_of(own_file)
    (path,) = cache_files(own_file)
    assert path.name.startswith("a-b-") and path.suffix == ".tokens"
    monkeypatch.setattr(sentencepiece.SentencePieceTokenizer, "encode", None)
    assert ids_of(own_file) == expected


def test_a_stream_is_opened_once(own_file):
    tokenizer, stream = fresh(own_file), concatenate("s", DOCUMENTS)
    assert data.tokenize(stream, tokenizer) is data.tokenize(stream, tokenizer)
    assert data.build_tokenizer(str(own_file)) is data.build_tokenizer(str(own_file))


def count_six(raw):
    before, field, after = raw.rpartition(b'"n_documents": 5')  # the header's own, not the key's
    return before + field[:-1] + b"6" + after


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-3],
        lambda raw: raw + b"x",
        lambda raw: raw[:4100] + bytes([raw[4100] ^ 1]) + raw[4101:],
        lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
        lambda raw: raw[:100],
        lambda raw: b"",
        lambda raw: b"[1]" + raw[3:],
        lambda raw: raw.replace(b'"n_tokens"', b'"m_tokens"'),
        lambda raw: raw.replace(b'"n_bytes": ', b'"n_bytes": 1'),
        count_six,
    ],
    ids=["cut", "more", "token", "separator", "header", "empty", "list", "field", "key", "count"],
)
def test_a_damaged_cache_is_written_anew(own_file, damage, caplog):
    expected = ids_of(own_file)
    (path,) = cache_files(own_file)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    with caplog.at_level(logging.WARNING):
        assert ids_of(own_file) == expected
    assert "cache_damaged" in caplog.text and str(path) in caplog.text
    assert path.read_bytes() == whole


def test_other_text_name_or_model_is_another_file(own_file):
    ids_of(own_file)
    ids_of(own_file, documents=[*DOCUMENTS[:-1], b"was \xea"])
    ids_of(own_file, documents=[b"".join(DOCUMENTS)])
    ids_of(own_file, name="c")
    assert len(cache_files(own_file)) == 4
    before = ids_of(own_file)
    own_file.write_bytes(train(vocab_size=300))
    assert ids_of(own_file) != before and len(cache_files(own_file)) == 5


def test_every_byte_of_a_text_is_digested(monkeypatch):
    monkeypatch.setattr(token_cache, "CHECK_BYTES", 4096)
    raw = np.random.default_rng(0).bytes(50_000)
    whole = token_cache.fingerprint(concatenate("s", [raw]))
    assert whole == token_cache.fingerprint(concatenate("s", [raw]))
    others = [[raw[:at] + b"?" + raw[at + 1 :]] for at in (0, 1, 4095, 4096, 30_000, 49_999)]
    others += [[raw[:99], raw[99:]], [raw + b"x"]]
    found = {token_cache.fingerprint(concatenate("s", documents)) for documents in others}
    assert len(found | {whole}) == 9


def test_nothing_is_left_of_a_failed_run(own_file, monkeypatch):
    monkeypatch.setattr(subwords, "BLOCK_BYTES", 7)
    encode = sentencepiece.SentencePieceTokenizer.encode

    def fail(self, text):
        if b"times" in bytes(text):
            raise ValueError("stop")
        return encode(self, text)

    monkeypatch.setattr(sentencepiece.SentencePieceTokenizer, "encode", fail)
    with pytest.raises(ValueError, match=r"a/b from byte \d+ on: stop"):
        ids_of(own_file)
    assert cache_files(own_file) == []


def test_a_folder_that_cannot_be_written_is_named(own_file, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied", kwargs["dir"])

    monkeypatch.setattr(files.tempfile, "mkstemp", refuse)
    with pytest.raises(PermissionError, match=r"own\.model\.tokens.*LONGCTX_TOKEN_CACHE"):
        ids_of(own_file)


def test_large_vocabularies_take_32_bits(tmp_path):
    ids = np.array([0, 70_000, 1])
    encoded = token_cache.load_or_encode(tmp_path, {"name": "s"}, [[ids[:1], ids[1:]]], 70_001)
    assert encoded.ids.dtype == np.int32 and encoded.ids.tolist() == ids.tolist()
    assert encoded.separators.tolist() == [2]


# names, paths, other models


def test_paths_are_relative_to_here_or_the_data_folder(own_file, monkeypatch):
    monkeypatch.chdir(own_file.parent)
    assert data.build_tokenizer("own.model").vocab_size == 340
    monkeypatch.chdir("/")
    assert data.build_tokenizer("own.model", str(own_file.parent)).vocab_size == 340
    with pytest.raises(FileNotFoundError, match=r"scripts\.train_tokenizer .*--out=no/own\.model"):
        data.build_tokenizer("no/own.model")


def test_package_missing_names_the_extra(own_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r'pip install "longctx_jax\[text\]"'):
        fresh(own_file)


def test_another_kind_of_file_is_named(tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"must be a SentencePiece model file: .*x\.model"):
        data.build_tokenizer(str(tmp_path / "x.model"))


def outside_model(path, **changes):
    """Writes a model with SentencePiece's own defaults, apart from byte fallback."""
    package = pytest.importorskip("sentencepiece")
    settings = {"vocab_size": 340, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    with path.open("wb") as file:
        package.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXT.splitlines()), model_writer=file, **(settings | changes)
        )
    return fresh(path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"byte_fallback": False, "vocab_size": 90}, "must have byte fallback"),
        ({"eos_id": -1}, "must have an end-of-sentence token"),
    ],
    ids=["no bytes", "no separator"],
)
def test_models_that_cannot_cover_text_are_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        outside_model(tmp_path / "x.model", **changes)


def test_models_that_change_text_are_refused(tmp_path):
    tokenizer = outside_model(tmp_path / "x.model")
    with pytest.raises(ValueError, match=r"turns b'age  of' into b'age of'.*normalisation"):
        tokenizer.encode("age  of")
    with pytest.raises(ValueError, match="s from byte 0 on: a SentencePiece model must keep text"):
        data.tokenize(concatenate("s", [b"age  of"]), tokenizer)


def test_no_space_is_put_before_a_text(tmp_path):
    """LLaMA's models ask for one, which would be a byte that no text has."""
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    tokenizer = outside_model(tmp_path / "x.model", **exact)
    assert tokenizer.decode(tokenizer.encode("age  of")) == b"age  of"
    plain = outside_model(tmp_path / "y.model", **exact, add_dummy_prefix=False)
    assert tokenizer.encode(TEXT).size == pytest.approx(plain.encode(TEXT).size, rel=0.02)


def test_a_token_for_the_beginning_of_a_document_is_its_first_input(tmp_path):
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    tokenizer = outside_model(tmp_path / "x.model", **exact, bos_id=1, eos_id=2)
    assert (tokenizer.start_id, tokenizer.separator_id) == (1, 2)
    assert data.prompt_ids(tokenizer, "")[0] == 1
    tokens = data.tokenize(concatenate("s", DOCUMENTS), tokenizer)
    (batch,) = data.evaluation_stripes(tokens, batch_size=1, seq_len=tokens.n_tokens)
    ends = batch["targets"][0] == 2
    assert ends.sum() == len(DOCUMENTS) and not (batch["tokens"] == 2).any()
    assert (batch["tokens"][0][1:][ends[:-1]] == 1).all() and batch["tokens"][0, 0] == 1


def test_a_model_with_too_few_ids_names_both(pieces):
    stream = concatenate("s", DOCUMENTS)
    message = (
        r"config\.model\.vocab_size=256, and 340 ids of config\.data\.tokenizer='.*tale\.model'"
    )
    with pytest.raises(ValueError, match=message):
        data.make_dataset(
            stream,
            pieces,
            seq_len=8,
            global_batch_size=1,
            seed=0,
            order="stripes",
            vocab_size=256,
        )
    tokens = data.tokenize(stream, pieces)
    with pytest.raises(ValueError, match=message):
        data.evaluation_stripes(tokens, batch_size=1, seq_len=8, vocab_size=256)


def test_evaluation_of_less_than_a_token_is_an_error(pieces):
    tokens = data.tokenize(concatenate("s", [b" times times"]), pieces)
    with pytest.raises(ValueError, match=r"config\.eval\.max_bytes .* of s: got 1"):
        data.evaluation_stripes(tokens, batch_size=1, seq_len=8, max_bytes=1)


# prompts and continuations


def test_prompts_begin_a_document_and_continuations_end_one(pieces):
    ids = data.prompt_ids(pieces, "the age")
    assert ids[0] == 1 and ids.dtype == np.int32 and pieces.decode(ids) == b"the age"
    assert data.prompt_ids(pieces, "").tolist() == [1]
    drawn = np.array([300, 500, 301, 1, 302])  # 500 is no id of the tokenizer
    assert data.until_separator(pieces, drawn).tolist() == [300, 301]
    plain = data.build_tokenizer("bytes")
    assert data.prompt_ids(plain, "a").tolist() == [97]
    assert data.until_separator(plain, np.array([97, 300, 98])).tolist() == [97, 98]


# training


def test_training_is_deterministic(model_file):
    assert train() == model_file.read_bytes()


def test_training_reads_the_first_bytes_only():
    stream = concatenate("s", [TEXT.encode(), "日本語".encode() * 100])
    size = len(TEXT.encode())
    short = train_model(stream, vocab_size=300, max_bytes=size)
    assert "日".encode() not in short
    assert "日".encode() in train_model(stream, vocab_size=300)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vocab_size": 200}, r"refuses 200 for tale \(.*; change --vocab_size"),
        ({"vocab_size": 90_000}, r"refuses 90000 for tale \(Vocabulary size too high"),
        ({"max_bytes": -1}, "max_bytes must not be negative: got -1"),
    ],
    ids=str,
)
def test_impossible_training_is_named(changes, match):
    with pytest.raises(ValueError, match=match):
        train(**changes)


def test_encoded_text_goes_elsewhere_where_the_model_is_read_only(own_file, tmp_path, monkeypatch):
    expected = ids_of(own_file)
    for path in cache_files(own_file):
        path.unlink()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(subwords.os, "access", lambda path, mode: False)
    assert ids_of(own_file) == expected and cache_files(own_file) == []
    (kept,) = (tmp_path / "home/.cache/longctx_jax/tokens").glob("own.model-*/*.tokens")
    assert kept.stat().st_size > 0
    monkeypatch.setenv("LONGCTX_TOKEN_CACHE", str(tmp_path / "chosen"))
    assert ids_of(own_file) == expected
    assert len(list((tmp_path / "chosen").glob("own.model-*/*.tokens"))) == 1
