import itertools
import json
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longctx_jax import data
from longctx_jax.data.streams import concatenate

GOLDEN = pathlib.Path(__file__).with_name("golden_batches.json")
FIELDS = {"tokens": "int32", "targets": "int32", "weights": "float32", "segment_ids": "int32"}


def text_stream(n_bytes, starts=(0,), seed=0):
    raw = np.random.default_rng(seed).integers(0, 256, n_bytes, np.uint8).tobytes()
    stops = [*starts[1:], n_bytes]
    return concatenate("random", [raw[a:b] for a, b in zip(starts, stops, strict=True)])


def dataset(stream, **changes):
    settings = {
        "seq_len": 16,
        "global_batch_size": 4,
        "seed": 0,
        "order": "stripes",
        "vocab_size": 256,
    }
    return data.make_dataset(stream, data.build_tokenizer("bytes"), **(settings | changes))


def numbered(n_tokens):
    """Returns a stream whose tokens tell their position, for at most 256 of them."""
    return concatenate("numbered", [bytes(range(n_tokens))])


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for field in expected:
        np.testing.assert_array_equal(actual[field], expected[field], err_msg=field)


@pytest.mark.parametrize("order", data.ORDERS)
def test_fields_and_dtypes(stream, order):
    batch = dataset(stream, order=order)[3]
    assert {field: str(value.dtype) for field, value in batch.items()} == FIELDS
    assert all(value.shape == (4, 16) for value in batch.values())
    assert (batch["weights"] == 1).all()


# stripes


@settings(max_examples=40, deadline=None)
@given(
    n_tokens=st.integers(8, 60),
    seq_len=st.integers(1, 90),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
    first=st.sampled_from([0, 1, 10**6]),
)
def test_stripes_continue_for_ever(n_tokens, seq_len, rows, seed, first):
    stream = text_stream(n_tokens, (0, 3, 5))
    text = stream.read(0, n_tokens)
    batches = dataset(stream, seq_len=seq_len, global_batch_size=rows, seed=seed)
    offset = data.pipeline._offset(data.tokenize(stream, data.build_tokenizer("bytes")), seed)
    assert 0 <= offset < n_tokens
    for step in range(first, first + 3):
        batch = batches[step]
        for row in range(rows):
            at = offset + row * (n_tokens // rows) + step * seq_len + np.arange(seq_len)
            assert (batch["tokens"][row] == text[at % n_tokens]).all()
            assert (batch["targets"][row] == text[(at + 1) % n_tokens]).all()
            document = np.array([0, 0, 0, 1, 1] + [2] * (n_tokens - 5))[at % n_tokens]
            assert (batch["segment_ids"][row] == at // n_tokens * 3 + document).all()


def test_row_b_continues_row_b(stream):
    batches = [dataset(stream)[step] for step in range(200)]  # three laps of 1,000 tokens
    tokens, targets, segments = (
        np.concatenate([batch[field] for batch in batches], axis=1)
        for field in ("tokens", "targets", "segment_ids")
    )
    assert (targets[:, :-1] == tokens[:, 1:]).all()
    steps = np.diff(segments, axis=1)
    assert set(np.unique(steps)) == {0, 1}, "segments grow by one document at a time"
    assert (segments[:, -1] - segments[:, 0] >= 3 * 5).all()
    assert sorted(tokens[0, :1000]) == sorted(stream.read(0, 1000))


def test_one_document_restarts_at_the_wrap():
    batches = dataset(numbered(100), seq_len=100, global_batch_size=1)
    batch = batches[0]
    wrap = int(np.argmin(batch["tokens"][0]))
    expected = [0] * wrap + [1] * (100 - wrap)
    assert batch["segment_ids"][0].tolist() == expected
    assert batch["tokens"][0, wrap - 1] == 99 and batch["targets"][0, wrap - 1] == 0


def test_stripes_of_other_seeds_start_elsewhere(stream):
    firsts = {dataset(stream, seed=seed)[0]["tokens"].tobytes() for seed in range(20)}
    assert len(firsts) > 15  # 20 draws out of 1,000 places may meet


def test_segment_ids_stay_int32(stream):
    segments = dataset(stream)[2**50]["segment_ids"]
    assert segments.min() >= 0


# shuffled


@settings(max_examples=15, deadline=None)
@given(
    n_tokens=st.integers(21, 200),  # a batch of the largest, and the last target
    seq_len=st.integers(1, 5),
    rows=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_shuffled_covers_each_window_once_an_epoch(n_tokens, seq_len, rows, seed):
    batches = dataset(
        numbered(n_tokens), seq_len=seq_len, global_batch_size=rows, seed=seed, order="shuffled"
    )
    n_windows = (n_tokens - 1) // seq_len
    n_steps = -(-3 * n_windows // rows)
    steps = [batches[step] for step in range(n_steps)]
    tokens = np.concatenate([batch["tokens"] for batch in steps])
    targets = np.concatenate([batch["targets"] for batch in steps])
    assert (targets == tokens + 1).all(), "a window never wraps"
    for epoch in range(3):
        starts = tokens[epoch * n_windows : (epoch + 1) * n_windows, 0]
        assert sorted(starts) == list(range(0, n_windows * seq_len, seq_len))


def test_shuffled_differs_between_epochs_and_seeds():
    batches = [
        dataset(numbered(65), seq_len=1, global_batch_size=64, seed=seed, order="shuffled")
        for seed in range(3)
    ]
    epochs = {batches[seed][step]["tokens"].tobytes() for seed in range(3) for step in range(5)}
    assert len(epochs) == 15
    unshuffled = np.arange(64, dtype=np.int32).tobytes()
    assert unshuffled not in epochs


def test_shuffled_segments_are_documents():
    stream = text_stream(101, (0, 50))
    batch = dataset(stream, seq_len=20, global_batch_size=5, order="shuffled")[0]
    tokens = stream.read(0, 100).reshape(5, 20)
    documents = (np.arange(100) >= 50).reshape(5, 20)
    for row in range(5):
        window = next(i for i in range(5) if (tokens[i] == batch["tokens"][row]).all())
        assert (batch["segment_ids"][row] == documents[window]).all()


# the order is a function of (seed, step, global batch size) alone


@pytest.mark.parametrize("order", data.ORDERS)
@pytest.mark.parametrize("n_processes", [1, 2, 4])
def test_processes_share_one_global_batch(stream, order, n_processes):
    whole = dataset(stream, order=order, global_batch_size=8)
    edges = np.linspace(0, 8, n_processes + 1).astype(int).tolist()
    for step in (0, 1, 17, 5000):
        parts = [
            dataset(stream, order=order, global_batch_size=8, rows=rows)[step]
            for rows in itertools.pairwise(edges)
        ]
        for field, expected in whole[step].items():
            joined = np.concatenate([part[field] for part in parts])
            np.testing.assert_array_equal(joined, expected)


@pytest.mark.parametrize("order", data.ORDERS)
@pytest.mark.parametrize("n_workers", [0, 1, 3])
def test_iterator_gives_the_batches_in_order(stream, order, n_workers):
    batches = dataset(stream, order=order)
    iterator = data.make_iterator(batches, n_workers=n_workers)
    for step in range(40):
        assert data.get_state(iterator) == {"next_index": step}
        assert_same(next(iterator), batches[step])


@pytest.mark.parametrize("order", data.ORDERS)
def test_iterator_restarts_from_its_saved_state(stream, order):
    first = data.make_iterator(dataset(stream, order=order))
    for _ in range(13):
        next(first)
    saved = json.loads(json.dumps(data.get_state(first)))
    expected = [next(first) for _ in range(5)]
    second = data.make_iterator(dataset(stream, order=order))
    next(second)
    data.set_state(second, saved)
    third = data.make_iterator(dataset(stream, order=order), start_step=13, n_workers=2)
    for batch in expected:
        assert_same(next(second), batch)
        assert_same(next(third), batch)


@pytest.mark.parametrize("order", data.ORDERS)
def test_any_step_can_be_read_at_once(stream, order):
    batches = dataset(stream, order=order)
    iterator = data.make_iterator(batches, start_step=10**12)
    assert_same(next(iterator), batches[10**12])


@pytest.mark.parametrize(
    "state", [{}, {"next_index": -1}, {"next_index": "3"}, {"next_index": 1, "x": 2}], ids=str
)
def test_bad_state_is_refused(stream, state):
    with pytest.raises(ValueError, match="next_index"):
        data.set_state(data.make_iterator(dataset(stream)), state)


def test_position_names_the_place(stream):
    tokenizer = data.build_tokenizer("bytes")
    for order in data.ORDERS:
        kwargs = {"seq_len": 16, "global_batch_size": 4, "seed": 5, "order": order}
        for step in (0, 70):
            words = data.position_of(stream, tokenizer, step, **kwargs)
            place = dict(word.split("=") for word in words.split())
            offset = int(place["byte_offset"])
            row = dataset(stream, **kwargs)[step]["tokens"][0]
            text = stream.read(0, 1000)
            assert (row == text[(offset + np.arange(16)) % 1000]).all()
            assert (place["source"], place["step"], place["order"]) == ("s", str(step), order)
            assert int(place["document"]) == stream.document_index(offset)


# golden: data order must not drift silently


def golden_batches():
    stream = concatenate("numbered", [bytes(range(120)), bytes(range(120, 250))])
    found = {}
    for order in data.ORDERS:
        for seed, step in ((0, 0), (1, 0), (0, 31)):
            batch = dataset(stream, seq_len=6, global_batch_size=3, seed=seed, order=order)[step]
            found[f"{order} seed={seed} step={step}"] = {
                field: batch[field].tolist() for field in ("tokens", "segment_ids")
            }
    return found


def test_golden_batches():
    assert golden_batches() == json.loads(GOLDEN.read_text()), (
        "the data order changed: runs resumed from older checkpoints would see other batches. If "
        "that is meant, run `python tests/data/test_pipeline.py --regenerate` and say so in the "
        "commit"
    )


# errors


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"seq_len": 0}, r"config\.data\.seq_len must be at least 1: got 0"),
        ({"global_batch_size": 0}, r"config\.data\.global_batch_size must be at least 1: got 0"),
        ({"order": "random"}, r"config\.data\.order must be one of .*'random'"),
        ({"seed": -1}, r"config\.train\.seed"),
        ({"seed": 2**32}, r"config\.train\.seed"),
        ({"rows": (3, 5)}, r"lie in 0 .. 4 \(config\.data\.global_batch_size\): got 3 .. 5"),
        ({"rows": (2, 2)}, "got 2 .. 2"),
        ({"global_batch_size": 501}, "at least 1002 tokens .* has 1000.*config.data.seq_len"),
        (
            {"order": "shuffled", "seq_len": 250},
            r"at least 1001 tokens .* has 1000, with seq_len=250, global_batch_size=4; .*lower",
        ),
    ],
    ids=str,
)
def test_bad_settings_are_named(stream, changes, match):
    with pytest.raises(ValueError, match=match):
        dataset(stream, **changes)


def test_shortest_streams_work():
    assert dataset(text_stream(8))[0]["tokens"].shape == (4, 16)
    assert dataset(text_stream(65), order="shuffled")[0]["tokens"].shape == (4, 16)


def test_bad_worker_count_is_named(stream):
    with pytest.raises(ValueError, match=r"config\.data\.n_workers"):
        data.make_iterator(dataset(stream), n_workers=-1)
    with pytest.raises(ValueError, match="next_index"):
        data.make_iterator(dataset(stream), start_step=-1)


@pytest.mark.parametrize("order", data.ORDERS)
def test_bytes_outside_the_vocabulary_are_named(order):
    stream = concatenate("utf8", [b"a" * 150 + b"\xc3\xa9" + b"b" * 48])
    batches = dataset(stream, order=order, seq_len=16, vocab_size=128, global_batch_size=2)
    message = r"got 195 at position 150 of utf8, vocab_size=128.*config\.model\.vocab_size"
    with pytest.raises(ValueError, match=message):
        for step in range(7):
            batches[step]
    with pytest.raises(ValueError, match="got 195 at position 150"):
        for _, _ in zip(range(7), data.make_iterator(batches), strict=False):
            pass


if __name__ == "__main__" and "--regenerate" in sys.argv:
    GOLDEN.write_text(json.dumps(golden_batches(), indent=1) + "\n")
