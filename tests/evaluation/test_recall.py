"""Recall accuracy: against logits made by hand, in any windows, and its bins and intervals."""

import jax
import numpy as np
import pytest

from configs import base
from configs.recall import passkey_armt
from configs.sweeps import recall_models
from longctx_jax import data
from longctx_jax.benchmarking import rows as rows_of
from longctx_jax.data.recall_tasks import Answer, Associative, Row
from longctx_jax.evaluation import recall
from longctx_jax.evaluation.language_modeling import evaluate
from longctx_jax.figures.recall import draw_recall
from longctx_jax.models import build_model
from scripts.recall import BIN

SEGMENT = 8
MEMORY = {"kind": "armt", "segment_len": SEGMENT, "n_memory_tokens": 1, "d_memory": 4}
# The split law of every model is tested with the models.
MODELS = {
    "softmax": {"name": "transformer"},
    "armt": {"name": "recurrent_memory", "memory": MEMORY},
}


def make_config(model="softmax", n_segments=3, n_rows=5):
    config = base.get_config()
    config.model.update({"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 32} | MODELS[model])
    config.data.name, config.data.order = "recall_associative", "shuffled"
    config.data.seq_len = (n_segments + 1) * SEGMENT
    config.data.recall.update({"segment_len": SEGMENT, "key_len": 1, "n_rows": n_rows})
    return config


def make_rows(config, batch_size=2, window_len=2 * SEGMENT):
    stream = data.load_source(config.data)["test"]
    assert isinstance(stream, data.RowStream)
    return data.RowBatches(stream, config.data.recall.n_rows, batch_size, window_len)


def test_an_answer_is_right_when_all_its_bytes_are():
    text = np.frombuffer(b"a=XYb=ZWa?XYb?ZW", np.uint8)
    answers = (Answer(10, 12, 1, 8), Answer(14, 16, 1, 8))
    predicted = np.zeros((1, 16), np.int32)
    predicted[0, :-1] = text[1:]
    rows = [Row(text, answers)]
    sizes = {"segment_len": 8, "n_segments": 1, "max_distance": 1, "key_len": 1, "value_len": 2}
    task = Associative(
        **sizes,
        n_questions=2,
        pairs_per_segment=2,
        n_symbols=26,
        rewrite=False,
        n_keys=0,
        noise="pad",
    )
    assert [s.is_right for s in recall.score_answers(predicted, rows, task)] == [True, True]
    assert [s.trivial for s in recall.score_answers(predicted, rows, task)] == [0.5, 0.5]
    predicted[0, 9] = ord("Q")  # the prediction of X: made at the question mark
    assert [s.is_right for s in recall.score_answers(predicted, rows, task)] == [False, True]
    predicted[0, 9:15] = text[10:16]
    predicted[0, 14] = ord("Q")  # of W, the last byte
    assert [s.is_right for s in recall.score_answers(predicted, rows, task)] == [True, False]
    predicted[0, :9] = predicted[0, 11:13] = predicted[0, 15] = 0  # what is no answer
    assert [s.is_right for s in recall.score_answers(predicted, rows, task)] == [True, False]


@pytest.mark.parametrize("model", ["softmax", pytest.param("armt", marks=pytest.mark.slow)])
def test_windows_do_not_matter(model):
    """Predictions and losses in windows with a cache are those of each row alone, in one call."""
    config = make_config(model)
    decoder = build_model(config.model)
    variables = decoder.init(jax.random.key(0))
    rows = [row for batch in make_rows(config) for row in batch][:3]
    sizes = {"batch_size": 4, "cache_len": config.data.seq_len}
    predicted, nll = recall.read_rows(decoder, variables, rows, window_len=3 * SEGMENT, **sizes)
    for b, row in enumerate(rows):
        tokens = row.text[None].astype(np.int32)
        logits = np.asarray(decoder.apply(variables, tokens).logits, np.float64)[0]
        log_sum = np.log(np.sum(np.exp(logits), axis=-1))
        wanted = log_sum[:-1] - logits[np.arange(tokens.size - 1), tokens[0, 1:]]
        np.testing.assert_allclose(nll[b, :-1], wanted, rtol=1e-4)
        np.testing.assert_array_equal(predicted[b], np.argmax(logits, axis=-1))


class Oracle:
    """Looks like a model; predicts each next byte of rows of even index, and nothing else."""

    config = build_model(make_config().model).config


def test_a_model_that_is_right_on_half_of_the_rows(monkeypatch):
    batches = make_rows(make_config(n_rows=6), batch_size=4)
    even = {row.text.tobytes() for i, row in enumerate(r for b in batches for r in b) if i % 2 == 0}

    def read_rows(model, variables, rows, **sizes):
        texts = np.stack([row.text for row in rows]).astype(np.int32)
        predicted = np.roll(texts, -1, axis=1)
        for b, row in enumerate(rows):
            predicted[b] *= row.text.tobytes() in even
        return predicted, np.full(texts.shape, np.log(2.0))

    monkeypatch.setattr(recall, "read_rows", read_rows)
    seen = []
    result = evaluate(Oracle(), {}, batches, cache_len=9, progress=lambda n, s: seen.append(n))
    assert result["accuracy"] == 0.5
    assert result["tokens"] == result["bytes"] == 6  # a byte an answer, and no byte besides
    assert result["bits_per_byte"] == pytest.approx(1.0)
    assert seen == [4 * 32, 6 * 32]


def test_a_loss_that_is_not_finite_and_cut_segments_are_errors():
    config = make_config("armt")
    decoder = build_model(config.model)
    variables = decoder.init(jax.random.key(0))
    with pytest.raises(ValueError, match="whole segments"):
        recall.evaluate_rows(decoder, variables, make_rows(config, window_len=12))
    broken = jax.tree.map(lambda x: x * np.nan, variables)
    with pytest.raises(ValueError, match="must be finite"):
        recall.evaluate_rows(decoder, broken, make_rows(config, window_len=64))


def scored(counts):
    """Questions from {distance: (right, wrong)}; the trivial guess is 1/distance."""
    return [
        recall.Scored(Answer(0, 1, distance, 10 * distance), is_right, 1 / distance)
        for distance, (right, wrong) in counts.items()
        for is_right in [True] * right + [False] * wrong
    ]


def test_accuracy_is_grouped_by_distance():
    counts = {1: (3, 1), 2: (0, 2), 3: (1, 0), 4: (0, 1), 9: (2, 0), 12: (1, 1)}
    total, *bins = recall.accuracy_rows(scored(counts), chance=0.25)
    assert total["is_total"] and total["n"] == 12 and total["accuracy"] == 7 / 12
    found = [
        (r["distance_segments_min"], r["distance_segments_max"], r["n"], r["accuracy"])
        for r in bins
    ]
    assert found == [(1, 1, 4, 0.75), (2, 2, 2, 0.0), (3, 4, 2, 0.5), (9, 12, 4, 0.75)]
    assert bins[2]["distance_segments"] == 3.5 and bins[2]["distance_bytes"] == 35
    assert [r["trivial"] for r in bins] == pytest.approx([1, 1 / 2, 7 / 24, 7 / 72])
    assert all(r["chance"] == 0.25 and not r["is_total"] for r in bins)
    assert all(r["accuracy_low"] <= r["accuracy"] <= r["accuracy_high"] for r in [total, *bins])


@pytest.mark.parametrize(
    "right, n, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (0, 0, 0, 1)],
)
def test_wilson_interval(right, n, low, high):
    """81 of 263: Newcombe (1998), Statistics in Medicine 17, table I, method 3."""
    assert recall.wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)


def test_the_figure_draws_the_newest_rows():
    fields = {"data": "recall_associative", "run": "a", "model": "armt", "split": "test"}
    fields |= {"step": 3, "train_n_segments": 4, "train_max_distance": 4, "n_segments": 4}
    rows = [
        rows_of.make(fields | {name: row.pop(name) for name in BIN}, row)
        for counts in ({1: (3, 1), 4: (2, 2)}, {1: (4, 0), 4: (2, 2)})
        for row in recall.accuracy_rows(scored(counts), chance=0.1)
    ]
    with pytest.raises(ValueError, match="'armt' has several at distance_segments=1"):
        draw_recall(list(map(rows_of.flat, rows)))
    rows = list(map(rows_of.flat, rows_of.newest(rows)))
    above, below = draw_recall(rows).axes
    (line,) = above.containers
    assert line[0].get_xydata().tolist() == [[1, 1.0], [4, 0.5]]
    assert below.containers[0][0].get_xydata().tolist() == [[4, 0.75]]
    (guess,) = [line for line in above.lines if line.get_label() == "guess without the question"]
    assert guess.get_xydata().tolist() == [[1, 1.0], [4, 0.25]]
    for row in rows:
        del row["trivial"]  # as recorded before there was one
    assert draw_recall(rows).axes
    with pytest.raises(ValueError, match="needs rows"):
        draw_recall([])


def test_the_sweep_compares_equal_sizes():
    sizes = []
    for override in recall_models.get_sweep():
        config = passkey_armt.get_config()
        config.update_from_flattened_dict(override)
        shapes = jax.eval_shape(build_model(config.model).init, jax.random.key(0))
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])))
    assert len(sizes) == 8 and max(sizes) / min(sizes) < 1.005
