"""Recall tasks: rows repeat, splits share none, answers are right by a parser of its own."""

import collections
import re

import numpy as np
import pytest

from configs import base
from longctx_jax import data
from longctx_jax.data.recall import split_of
from longctx_jax.data.recall_tasks import Answer
from longctx_jax.data.recall_text_tasks import Facts, Passkey
from longctx_jax.data.streams import concatenate

BOOKS = b"".join(b"It was the %dth day, and nobody had said a word.\n" % i for i in range(900))


@pytest.fixture
def load(tmp_path):
    """Returns a function (name, n_segments, **recall fields) -> config.data, splits."""
    (tmp_path / "book.txt").write_bytes(BOOKS)

    def load(name, n_segments, seq_len=None, **fields):
        config = base.get_config().data
        config.name, config.order = f"recall_{name}", "shuffled"
        config.files, config.recall.text = (str(tmp_path / "book.txt"),), "text"
        config.validation_fraction = config.test_fraction = 0.3
        config.recall.segment_len = 32 if name == "associative" else 128
        config.recall.update(fields)
        config.seq_len = seq_len or (n_segments + 1) * config.recall.segment_len
        return config, data.load_source(config)

    return load


def dataset(config, splits, seed=0, batch=2, **options):
    options = {"order": config.order, "seq_len": config.seq_len, "vocab_size": 256} | options
    tokenizer = data.build_tokenizer("bytes")
    return data.make_dataset(
        splits["train"], tokenizer, global_batch_size=batch, seed=seed, **options
    )


TASKS = {
    "associative": {},
    "pairs": {"pairs_per_segment": 2, "n_questions": 3, "value_len": 2, "noise": "random"},
    "rewrite": {"rewrite": True, "key_len": 1},
    "passkey": {},
    "facts": {},
    "chain": {"chain": True, "n_facts": 6},
}


def task_name(case):
    renamed = {"pairs": "associative", "rewrite": "associative", "chain": "facts"}
    return renamed.get(case, case)


# Parsers that know the text alone: row -> [(answer, distance in bytes, start of the fact)].


def parse_associative(text):
    facts, found = {}, []
    for match in re.finditer(rb"([a-z]+)([=?])([A-Z]+)", text):
        if match[2] == b"=":
            facts[match[1]] = match  # the newest
        else:
            fact = facts[match[1]]
            assert fact[3] == match[3]
            found.append((match[3], match.start() - fact.start(), fact.start()))
    return found


def parse_passkey(text):
    number = re.search(rb"The pass key is (\d+)\. Remember it\.", text)
    question = re.search(rb"What is the pass key\? The pass key is (\d+)$", text)
    assert number[1] == question[1]
    return [(question[1], question.start() - number.start(), number.start())]


def parse_facts(text):
    places, holders = {}, {}
    for match in re.finditer(rb"(\w+) (?:\w+ to the (\w+)|took the (\w+))\. ", text):
        person, place, thing = match.groups()
        if place:
            places[person] = (place, match.start())
        else:
            holders[thing] = (person, match.start())
    question = re.search(rb"Where is (?:the )?(\w+)\? (\w+)\.$", text)
    starts = []
    person = question[1]
    if person in holders:
        person, start = holders[person]
        starts.append(start)
    place, start = places[person]
    assert place == question[2]
    first = min([start, *starts])
    return [(place + b".", question.start() - first, first)]


PARSERS = {"associative": parse_associative, "passkey": parse_passkey, "facts": parse_facts}


@pytest.mark.parametrize("case", TASKS)
def test_the_answer_is_what_the_row_says(load, case):
    """Also its distances, and that it stands at the end."""
    config, splits = load(task_name(case), 6, **TASKS[case])
    rows = [splits[split].row(i) for split in ("train", "test") for i in range(40)]
    for row in rows:
        text = row.text.tobytes()
        assert len(text) == config.seq_len
        parsed = PARSERS[task_name(case)](text)
        assert len(parsed) == len(row.answers)
        for answer, (wanted, n_bytes, start) in zip(row.answers, parsed, strict=True):
            assert text[answer.start : answer.stop] == wanted
            assert answer.distance_bytes == n_bytes
            assert answer.distance_segments == 6 - start // config.recall.segment_len
        assert row.answers[-1].stop == len(text)


@pytest.mark.parametrize("case", TASKS)
def test_rows_are_a_function_of_seed_split_and_index(load, case):
    first, second = (load(task_name(case), 3, **TASKS[case]) for _ in range(2))
    for split in ("train", "validation", "test"):
        rows = [[splits[split].row(i).text for i in (7, 3)] for _, splits in (first, second)]
        np.testing.assert_array_equal(*rows)
        assert not np.array_equal(*rows[0])
    assert not np.array_equal(first[1]["train"].row(3, 1).text, first[1]["train"].row(3, 2).text)


@pytest.mark.parametrize("case", ["associative", "passkey"])
def test_no_row_is_in_two_splits(load, case):
    """Of a task so small that rows drawn at random would be."""
    tiny = {"segment_len": 4, "key_len": 1, "n_symbols": 6} if case == "associative" else {}
    _, splits = load(case, 1, **tiny)
    found = {
        split: {splits[split].row(i, seed).text.tobytes() for i in range(60) for seed in (0, 1)}
        for split in ("train", "validation", "test")
    }
    assert all(len(texts) > 5 for texts in found.values())
    for split, texts in found.items():
        assert {split_of(np.frombuffer(text, np.uint8)) for text in texts} == {split}
    assert not found["train"] & found["test"] and not found["train"] & found["validation"]
    assert not found["validation"] & found["test"]


def test_rows_stay_as_they_are(load):
    """Golden: other rows would make recorded results incomparable."""
    _, splits = load("associative", 2, segment_len=8)
    assert splits["test"].row(5).text.tobytes() == b"..qj=S.....ck=N.....ck?N"


@pytest.mark.parametrize("case", TASKS)
def test_a_batch_weighs_answers_alone(load, case):
    config, splits = load(task_name(case), 4, **TASKS[case])
    batch = dataset(config, splits, seed=3)[5]
    assert set(batch) == {"tokens", "targets", "weights", "model_weights"}
    assert np.all(batch["model_weights"] == 1)
    for b in range(2):
        row = splits["train"].row(10 + b, 3)
        np.testing.assert_array_equal(batch["tokens"][b], row.text)
        np.testing.assert_array_equal(batch["targets"][b, :-1], row.text[1:])
        counted = batch["targets"][b][batch["weights"][b] == 1].astype(np.uint8).tobytes()
        parsed = PARSERS[task_name(case)](row.text.tobytes())
        assert counted == b"".join(answer for answer, _, _ in parsed)
        assert set(batch["weights"][b]) == {0, 1}


def test_the_order_does_not_depend_on_the_number_of_processes(load):
    config, splits = load("associative", 3)
    whole = dataset(config, splits, batch=4)[2]["tokens"]
    parts = [dataset(config, splits, batch=4, rows=rows)[2]["tokens"] for rows in ((0, 2), (2, 4))]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("case", TASKS)
@pytest.mark.parametrize("limit", [0, 3])
def test_distances_are_uniform_up_to_the_limit(load, case, limit):
    _, splits = load(task_name(case), 5, max_distance_segments=limit, **TASKS[case])
    rows = [splits["train"].row(i) for i in range(150)]
    found = collections.Counter(a.distance_segments for row in rows for a in row.answers)
    farthest = limit or 5
    assert sorted(found) == list(range(1, farthest + 1))
    expected = sum(found.values()) / farthest
    assert all(abs(n - expected) < 5 * expected**0.5 for n in found.values()), found


def test_keys_are_unique_unless_rewritten(load):
    def pairs(row):
        return re.findall(rb"([a-z]+)=([A-Z]+)", row.text.tobytes())

    _, splits = load("associative", 12, key_len=1)
    for i in range(20):
        assert len(dict(pairs(splits["train"].row(i)))) == 12
    _, splits = load("associative", 12, key_len=1, rewrite=True, n_keys=5)
    n_older = 0
    for i in range(40):
        row = splits["train"].row(i)
        text = row.text.tobytes()
        assert len(dict(pairs(row))) <= 5
        ((answer, _, _),) = parse_associative(text)
        key = text[-3:-2]
        written = [value for k, value in pairs(row) if k == key]
        assert written[-1] == answer
        n_older += written[0] != answer
    assert n_older > 20  # taking the oldest value would be wrong


def test_asked_keys_are_rewritten_wherever_there_is_a_place(load):
    """As many as can be: each needs an earlier place of its own that is not asked for."""
    fields = {"n_questions": 3, "pairs_per_segment": 2, "n_symbols": 6, "rewrite": True}
    _, splits = load("associative", 6, segment_len=16, key_len=2, n_keys=5, **fields)
    n_wanted = n_written = 0
    for i in range(150):
        text = splits["train"].row(i).text.tobytes()
        keys = re.findall(rb"([a-z]+)=", text)
        last = {
            key: len(keys) - 1 - keys[::-1].index(key) for key in re.findall(rb"([a-z]+)\?", text)
        }
        assert len(last) == 3
        n_used = 0
        for n_asked_before, place in enumerate(sorted(last.values())):
            n_used += place - n_asked_before > n_used
        n_wanted += n_used
        n_written += sum(keys.index(key) < place for key, place in last.items())
    assert n_written == n_wanted > 300


@pytest.mark.parametrize("n_facts", [3, 4, 6])
@pytest.mark.parametrize("chain", [False, True])
def test_where_somebody_moved_last_says_little(load, chain, n_facts):
    """0.27 .. 0.59 of many rows; 0.53 .. 0.83 of chains whose moves were scattered anyhow."""
    _, splits = load("facts", 5, segment_len=160, chain=chain, n_facts=n_facts)
    stream = splits["train"]
    rows = [stream.row(i) for i in range(300)]
    found = np.mean([stream.task.trivial(row, row.answers[0]) for row in rows])
    by_parser = []
    for row in rows:
        text = row.text.tobytes()
        place = re.findall(rb" to the (\w+)\. ", text)[-1]
        by_parser.append(text.endswith(b" %s." % place))
    assert found == np.mean(by_parser)
    n_moves = 2 if chain else n_facts  # the answer's and one other's, or more
    guess = 1 / n_moves + (1 - 1 / n_moves) / 6  # any one of them, or its place by chance
    assert found < guess + 0.09  # three deviations


def test_the_trivial_guess_of_a_pair_and_of_a_passkey(load):
    _, splits = load("associative", 3, n_symbols=2, value_len=2, noise="random")
    for i in range(20):
        row = splits["test"].row(i)
        values = re.findall(rb"=(..)", row.text.tobytes())
        wanted = row.text.tobytes()[-2:]
        assert splits["test"].task.trivial(row, row.answers[0]) == values.count(wanted) / 3
    _, splits = load("passkey", 3, n_digits=2)
    assert splits["test"].task.trivial(splits["test"].row(0), Answer(0, 2, 1, 9)) == 0.01


def test_evaluation_gives_each_held_out_row_once(load):
    config, splits = load("associative", 3, n_rows=5)
    tokens = data.tokenize(splits["test"], data.build_tokenizer("bytes"))
    assert tokens.n_tokens == 5 * config.seq_len
    batches = data.evaluation_stripes(tokens, batch_size=2, seq_len=32, vocab_size=256)
    assert isinstance(batches, data.RowBatches)
    rows = [row for batch in batches for row in batch]
    assert [len(batch) for batch in batches] == [2, 2, 1]
    np.testing.assert_array_equal(
        np.concatenate([row.text for row in rows]), splits["test"].read(0, tokens.n_tokens)
    )
    limited = data.evaluation_stripes(tokens, batch_size=2, seq_len=32, max_bytes=300)
    assert isinstance(limited, data.RowBatches) and limited.n_rows == 2


ERRORS = {
    "no question": ("associative", {"seq_len": 32}, "data.seq_len"),
    "half a segment": ("associative", {"seq_len": 80}, "data.seq_len"),
    "no segments": ("associative", {"segment_len": 0}, "recall.segment_len"),
    "distance": ("associative", {"max_distance_segments": -1}, "max_distance_segments"),
    "few keys": ("associative", {"key_len": 1, "n_symbols": 2}, "key_len"),
    "long pair": ("associative", {"key_len": 20, "value_len": 12}, "segment_len"),
    "many questions": ("associative", {"n_questions": 5}, "n_questions"),
    "wide questions": ("associative", {"n_questions": 3, "key_len": 9}, "segment_len"),
    "rewrite keys": ("associative", {"rewrite": True, "n_keys": 1}, "n_keys"),
    "symbols": ("associative", {"n_symbols": 27}, "n_symbols"),
    "noise": ("associative", {"noise": "text"}, "recall.noise"),
    "rows": ("associative", {"n_rows": 0}, "n_rows"),
    "short segment": ("passkey", {"segment_len": 32}, "segment_len"),
    "no digits": ("passkey", {"n_digits": 0}, "n_digits"),
    "text": ("passkey", {"text": "recall_facts"}, "recall.text"),
    "many facts": ("facts", {"n_facts": 40}, "n_facts"),
    "one fact": ("facts", {"n_facts": 1, "chain": True}, "n_facts"),
    "short facts": ("facts", {"segment_len": 32}, "segment_len"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_field(load, case):
    name, fields, field = ERRORS[case]
    with pytest.raises(ValueError, match=rf"config\.data\.(recall\.)?{field.split('.')[-1]}"):
        load(name, 4, **fields)


def test_rows_need_bytes_their_own_length_and_no_stripes(load):
    config, splits = load("associative", 4)
    with pytest.raises(ValueError, match="config.data.tokenizer must be 'bytes'"):
        data.tokenize(splits["train"], data.build_tokenizer("delimited_bytes"))
    with pytest.raises(ValueError, match="config.data.order must be 'shuffled'"):
        dataset(config, splits, order="stripes")
    with pytest.raises(ValueError, match="seq_len=32"):
        dataset(config, splits, seq_len=32)
    with pytest.raises(ValueError, match="vocab_size"):
        _ = dataset(config, splits, vocab_size=64)[0]


def test_short_texts_and_small_tasks_are_errors(load):
    _, splits = load("passkey", 400)
    with pytest.raises(ValueError, match="config.data.recall.text"):
        splits["test"].row(0)
    _, splits = load("associative", 1, segment_len=3, key_len=1, n_symbols=2)
    found = [split for split in ("train", "validation", "test") if has_row(splits[split])]
    assert 1 <= len(found) < 3  # two keys and two values make four rows


def has_row(stream):
    try:
        stream.row(0)
    except ValueError as error:
        assert "rows of its own" in str(error)
        return False
    return True


def test_noise_that_holds_a_fact_is_drawn_again():
    text = concatenate("noise", [b"Mary went to the garden. " * 100])
    task = Facts(128, 2, 2, n_facts=3, chain=False)
    assert task.draw(np.random.default_rng(0), text) is None
    text = concatenate("noise", [b"the pass key is lost. " * 100])
    task = Passkey(128, 2, 2, n_digits=5)
    assert task.draw(np.random.default_rng(0), text) is None
