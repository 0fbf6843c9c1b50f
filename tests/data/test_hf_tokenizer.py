"""tokenizer.json of both kinds that cover all bytes, and what must not change a text."""

import json
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longctx_jax import data
from longctx_jax.data import hf_tokenizer, subwords
from longctx_jax.data.streams import concatenate
from longctx_jax.data.tokenizers import require_one_encoding

tokenizers = pytest.importorskip("tokenizers")

TEXT = (
    "It was the best of times, it was the worst of times, it was the age of wisdom.\r\n \n"
    "    We had 1234567 things before us; we've had nothing\tbefore us...\n\n" * 20
)
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
# of LLaMA 3
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ODD = [
    "",
    " ",
    "\n \n  x",
    f"a {END} </s> <unk> <0x41> b",
    "e\u0301 \u2581 \u2581\u2581a \u00a0 \u3000",
    "👩\u200d👧 日本語",
    b"caf\xe9 \xff\xfe\xe2\x96 \xed\xa0\x80",
]
DOCUMENTS = [b"It was the age.\n", b"x", "best of  times \u2581 é👧".encode(), b" ", b"was \xe9"]


def save(folder, spec, **config):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def byte_level():
    """Returns a description in the shape of LLaMA 3's, and the library's object."""
    t = tokenizers
    made = t.Tokenizer(t.models.BPE(ignore_merges=True))
    made.normalizer = t.normalizers.NFC()
    split = t.pre_tokenizers.Split(t.Regex(WORDS), "isolated")
    level = t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = t.pre_tokenizers.Sequence([split, level])
    made.decoder = t.decoders.ByteLevel()
    alphabet = t.pre_tokenizers.ByteLevel.alphabet()
    trainer = t.trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    made.add_special_tokens([BEGIN, END])
    made.post_processor = t.processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, made.token_to_id(BEGIN))]
    )
    return json.loads(made.to_str()), made


def fallback():
    """Returns a description in the shape of LLaMA 2's, and the library's object."""
    t = tokenizers
    made = t.Tokenizer(t.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = t.trainers.BpeTrainer(vocab_size=360, special_tokens=names, show_progress=False)
    made.train_from_iterator(["\u2581" + word for word in TEXT.split()], trainer)
    spec = json.loads(made.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    spec["normalizer"] = {"type": "Sequence", "normalizers": [prepend, spaces]}
    return spec, t.Tokenizer.from_str(json.dumps(spec))


KINDS = {"byte_level": byte_level, "fallback": fallback}


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """Returns our tokenizer, its description, and the library's own object."""
    spec, library = KINDS[request.param]()
    ends = {"bos_token": BEGIN, "eos_token": {"content": END}}
    if request.param == "fallback":
        ends = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    path = save(tmp_path_factory.mktemp("tokenizer"), spec, **ends)
    return data.build_tokenizer(str(path)), spec, library


@pytest.fixture(scope="module")
def plain(made):
    return made[0]


def raw_texts():
    characters = st.one_of(
        st.characters(exclude_categories=("Cs",)), st.sampled_from(" \n\r\t\u2581ae\u0301")
    )
    return st.one_of(st.text(characters).map(str.encode), st.binary())


@settings(max_examples=150, deadline=None)
@given(raw=raw_texts())
@example(raw=b"".join(text.encode() for text in ODD if isinstance(text, str)))
def test_any_bytes_round_trip(plain, raw):
    ids = plain.encode(raw)
    assert ids.dtype == np.int32 and plain.decode(ids) == raw
    counts = plain.token_bytes(ids)
    assert [len(plain.decode(ids[i : i + 1])) for i in range(ids.size)] == counts.tolist()


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_odd_text_round_trips_and_holds_no_special_token(plain, text):
    ids = plain.encode(text)
    assert plain.decode(ids) == (text.encode() if isinstance(text, str) else text)
    assert not {plain.separator_id, plain.start_id} & set(ids.tolist())


def test_ids_are_the_librarys(made):
    tokenizer, _, library = made

    def after_the_first_word(encode):  # before it LLaMA 2 puts a space
        return encode(TEXT)[len(encode(TEXT.split()[0])) :]

    ids = after_the_first_word(lambda text: tokenizer.encode(text).tolist())
    assert ids == after_the_first_word(lambda t: library.encode(t, add_special_tokens=False).ids)
    assert max(ids) < tokenizer.vocab_size == library.get_vocab_size()
    assert len(TEXT) / 4 < len(ids) < len(TEXT) / 1.2


@pytest.mark.parametrize("chunk", [60, 300])
def test_cutting_changes_no_token(plain, monkeypatch, chunk):
    whole = plain.encode(TEXT).tolist()
    monkeypatch.setattr(subwords, "CHUNK_BYTES", chunk)
    assert plain.encode(TEXT).tolist() == whole


def test_white_space_is_never_cut():
    text = "a \n b\n\n  c d\t e\u00a0 f"
    cuts = {text.encode()[:stop].decode() for stop in range(1, len(text.encode()))
            if (cut := subwords.last_cut(text.encode()[: stop + 1])) and cut == stop}  # fmt: skip
    assert all(not head[-1].isspace() for head in cuts if text[len(head)] == " ")
    assert subwords.last_cut(b"ab \n c") == 2 and subwords.last_cut(b"a\n c") == 4


def test_documents_begin_with_one_token_and_end_with_another(made, tmp_path):
    tokenizer, spec, _ = made
    ends = (tokenizer.start_id, tokenizer.separator_id)
    vocab = {token["id"]: token["content"] for token in spec["added_tokens"]}
    assert tuple(vocab[index] for index in ends) in ((BEGIN, END), ("<s>", "</s>"))
    stream = concatenate("s", DOCUMENTS)
    tokens = data.tokenize(stream, tokenizer)
    ids = tokens.read(0, tokens.n_tokens)
    split = np.split(ids, np.flatnonzero(ids == ends[1]) + 1)[:-1]
    assert [tokenizer.decode(part) for part in split] == DOCUMENTS
    sizes = {"seq_len": 8, "global_batch_size": 1, "seed": 0, "order": "stripes"}
    dataset = data.make_dataset(stream, tokenizer, vocab_size=tokenizer.vocab_size, **sizes)
    inputs, targets, segments = (
        np.concatenate([dataset[step][field][0] for step in range(20)])
        for field in ("tokens", "targets", "segment_ids")
    )
    assert ends[1] in targets and ends[0] not in targets
    assert ends[0] in inputs and ends[1] not in inputs
    assert (np.diff(segments) == (inputs[1:] == ends[0])).all()
    (batch,) = data.evaluation_stripes(tokens, batch_size=1, seq_len=ids.size)
    assert batch["tokens"][0, 0] == ends[0] and ends[1] not in batch["tokens"]
    assert batch["targets"][0].tolist() == ids.tolist()
    assert batch["target_bytes"].sum() == stream.n_bytes
    assert data.prompt_ids(tokenizer, "x")[0] == ends[0]
    drawn = np.array([*tokenizer.encode("It"), ends[1], 5])
    assert tokenizer.decode(data.until_separator(tokenizer, drawn)) == b"It"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (END, END)),
        ({"bos_token": BEGIN}, (BEGIN, END)),
        ({"bos_token": BEGIN, "add_bos_token": False}, (END, END)),
        ({"bos_token": None, "eos_token": BEGIN}, (BEGIN, BEGIN)),
    ],
    ids=str,
)
def test_the_ends_of_documents_come_from_the_config_beside(tmp_path, config, expected):
    spec, library = byte_level()
    tokenizer = data.build_tokenizer(str(save(tmp_path, spec, **config)))
    ids = tuple(library.token_to_id(name) for name in expected)
    assert (tokenizer.start_id, tokenizer.separator_id) == ids


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_a_named_end_must_be_in_the_vocabulary(tmp_path, name):
    spec, _ = byte_level()
    with pytest.raises(ValueError, match=f"{name} must be a token of .*: got 'no token'"):
        data.build_tokenizer(str(save(tmp_path, spec, **{name: "no token"})))


def test_dropout_of_merges_is_switched_off(tmp_path):
    """One of training: a text would have other ids each time, and the cache would keep one draw."""
    spec, _ = byte_level()
    plain = data.build_tokenizer(str(save(tmp_path, spec)))
    spec["model"]["dropout"] = 0.5
    (tmp_path / "drops").mkdir()
    dropping = data.build_tokenizer(str(save(tmp_path / "drops", spec)))
    text = b"the quick brown fox and the other fox " * 20
    for _ in range(3):
        assert dropping.encode(text).tolist() == plain.encode(text).tolist()


def test_a_tokenizer_that_draws_is_refused():
    class Drawing:
        name, draws = "drawing", iter(range(99))

        def encode(self, text):
            return np.array([next(self.draws)])

    with pytest.raises(ValueError, match="must encode a text in one way: drawing draws at random"):
        require_one_encoding(Drawing())


def test_other_forms_of_the_space_before_a_text(tmp_path):
    spec, _ = fallback()
    plain = data.build_tokenizer(str(save(tmp_path / "a", spec))).encode(TEXT).tolist()
    meta = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    spec |= {"normalizer": None, "pre_tokenizer": meta}
    assert data.build_tokenizer(str(save(tmp_path / "b", spec))).encode(TEXT).tolist() == plain
    spec, _ = byte_level()
    plain = data.build_tokenizer(str(save(tmp_path / "c", spec))).encode(TEXT).tolist()
    spec["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True
    spec["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0,
                          "direction": "Right"}  # fmt: skip
    assert data.build_tokenizer(str(save(tmp_path / "d", spec))).encode(TEXT).tolist() == plain


def test_added_words_are_text_and_unused_ids_are_none(tmp_path):
    _, library = byte_level()
    library.add_tokens(["times,"])
    spec = json.loads(library.to_str())
    tokenizer = data.build_tokenizer(str(save(tmp_path, spec)))
    ids = tokenizer.encode("of times, it")
    assert library.token_to_id("times,") in ids and tokenizer.decode(ids) == b"of times, it"
    assert tokenizer.decode(np.array([tokenizer.separator_id])) == b""


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda s: s.update(pre_tokenizer=None), "must be byte-level or have byte fallback"),
        (lambda s: s["model"].update(type="Riddle"), "must be a tokenizer.json: .* cannot be read"),
        (lambda s: s.pop("model"), "must be a tokenizer.json"),
        (lambda s: s.update(added_tokens=[]), "must have a token that ends a document"),
        (lambda s: s["model"]["vocab"].update(far=2**31), "must have ids below 4194304"),
    ],
    ids=["no bytes", "kind", "no model", "no end", "ids"],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, edit, match):
    spec, _ = byte_level()
    edit(spec)
    with pytest.raises(ValueError, match=match):
        data.build_tokenizer(str(save(tmp_path, spec)))


def test_text_that_is_changed_is_refused(tmp_path):
    spec, _ = byte_level()
    spec["normalizer"] = {"type": "Lowercase"}
    tokenizer = data.build_tokenizer(str(save(tmp_path, spec)))
    with pytest.raises(ValueError, match=r"turns b'It was' into b'it was'; use one whose normal"):
        tokenizer.encode("It was")


def test_package_missing_names_the_extra(tmp_path, monkeypatch):
    path = save(tmp_path, byte_level()[0])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "longctx_jax\[hf\]"'):
        hf_tokenizer.HFTokenizer(path)


def test_a_broken_config_beside_is_named(tmp_path):
    path = save(tmp_path, byte_level()[0])
    path.with_name("tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json must hold a JSON object"):
        hf_tokenizer.HFTokenizer(path)
