"""The loop: exact resumption, signals, non-finite losses, work directories, init_from."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from longctx_jax import data
from longctx_jax.models import build_model
from longctx_jax.runs.train import train_data
from longctx_jax.training import loop, reporter
from longctx_jax.training.checkpoint import Checkpointer
from longctx_jax.training.metrics import read_records
from longctx_jax.training.optimizer import make_optimizer
from longctx_jax.training.state import init_state
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def splits():
    return data.load_source(tiny_config().data)


def run(workdir, splits, *, before_step=None, evaluate=None, **fields):
    """Trains the tiny config; before_step(step) is called while the batch of a step is read."""
    config = tiny_config(**fields)
    model = build_model(config.model)
    of_config = train_data(config, splits)
    if before_step:

        def spy(step, batch):
            before_step(step)
            return batch

        of_config = loop.TrainData(
            of_config.dataset.map_with_index(spy), of_config.position_of, of_config.is_bytes
        )
    return loop.train(
        config, workdir, model, of_config, evaluate or (lambda state: {"bits_per_byte": 1.0})
    )


def state_of(workdir, **fields):
    config = tiny_config(**fields)
    model = build_model(config.model)
    tx, _ = make_optimizer(config.optim, 1)
    saved = Checkpointer(workdir, is_read_only=True)

    def fresh():
        return init_state(
            model,
            tx,
            seed=0,
            batch_size=config.data.global_batch_size,
            cache_len=config.data.seq_len,
            use_ema=bool(config.train.ema_decay),
        )

    restored = saved.restore(saved.steps()[-1], jax.eval_shape(fresh))
    state = restored.state.replace(key=jax.random.key_data(restored.state.key))
    return restored.step, jax.tree.map(np.asarray, state)


def assert_same_state(a, b):
    assert a[0] == b[0]
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a[1]), jax.tree.leaves(b[1]), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


OPTIONS = {"model__dropout": 0.2, "train__ema_decay": 0.9, "train__checkpoint_every": 100}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, splits):
    workdir = tmp_path_factory.mktemp("undisturbed")
    run(workdir, splits, train__n_steps=20, **OPTIONS)
    return workdir


def test_ten_and_ten_are_twenty(undisturbed, tmp_path, splits):
    run(tmp_path, splits, train__n_steps=10, **OPTIONS)
    run(tmp_path, splits, train__n_steps=20, **OPTIONS)
    assert_same_state(state_of(tmp_path, **OPTIONS), state_of(undisturbed, **OPTIONS))
    seconds = [r["seconds"] for r in read_records(tmp_path / "metrics.jsonl") if "seconds" in r]
    assert seconds == sorted(seconds)  # a resumed run counts on


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_rest_is_the_same(undisturbed, tmp_path, splits, number):
    def stop(step):
        if step == 7:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    record = run(tmp_path, splits, before_step=stop, train__n_steps=20, **OPTIONS)
    assert not record["is_finished"] and 0 < record["step"] < 20
    assert Checkpointer(tmp_path, is_read_only=True).steps() == [record["step"]]
    assert not (tmp_path / "DONE.json").exists()
    assert signal.getsignal(number) is before
    run(tmp_path, splits, train__n_steps=20, **OPTIONS)
    assert_same_state(state_of(tmp_path, **OPTIONS), state_of(undisturbed, **OPTIONS))
    losses = [r["loss"] for r in read_records(tmp_path / "metrics.jsonl") if "loss" in r]
    expected = [r["loss"] for r in read_records(undisturbed / "metrics.jsonl") if "loss" in r]
    assert losses == expected


@pytest.mark.slow
def test_a_crash_loses_only_the_steps_since_the_checkpoint(undisturbed, tmp_path, splits):
    options = OPTIONS | {"train__checkpoint_every": 5, "data__n_workers": 1}

    def crash(step):
        if step == 13:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        run(tmp_path, splits, before_step=crash, train__n_steps=20, **options)
    assert Checkpointer(tmp_path, is_read_only=True).steps()[-1] in (5, 10)
    run(tmp_path, splits, train__n_steps=20, **options)
    assert_same_state(state_of(tmp_path, **OPTIONS), state_of(undisturbed, **OPTIONS))


def test_what_a_finished_run_leaves(undisturbed):
    done = json.loads((undisturbed / "DONE.json").read_text())
    assert done["step"] == 20 and done["eval"]["bits_per_byte"] == 1.0
    assert done["eval"]["split"] == "validation"
    records = read_records(undisturbed / "metrics.jsonl")
    steps = [r["step"] for r in records if "loss" in r]
    assert steps == list(range(1, 21))
    first = next(r for r in records if "loss" in r)
    for name in (
        "bits_per_byte",
        "grad_norm",
        "learning_rate",
        "tokens_per_s",
        "tokens",
        "seconds",
    ):
        assert np.isfinite(first[name])
    assert first["bits_per_byte"] == pytest.approx(first["loss"] / np.log(2))
    assert first["tokens"] == 64


def test_a_finished_run_is_not_trained_again(undisturbed, tmp_path, splits):
    before = state_of(undisturbed, **OPTIONS)
    record = run(undisturbed, splits, train__n_steps=20, **OPTIONS)
    assert record["is_finished"] and record["step"] == 20
    assert_same_state(state_of(undisturbed, **OPTIONS), before)


def test_another_config_is_refused(undisturbed, splits):
    with pytest.raises(ValueError, match=r"config.optim.learning_rate: 0.001 there, 0.5 here"):
        run(undisturbed, splits, train__n_steps=20, optim__learning_rate=0.5, **OPTIONS)
    with pytest.raises(ValueError, match=r"config.model.d_model: 16 there, 32 here"):
        run(undisturbed, splits, train__n_steps=20, model__d_model=32, **OPTIONS)


def test_a_checkpoint_of_another_model_is_refused(undisturbed, tmp_path, splits):
    os.symlink(undisturbed / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"differs in .* arrays: .*embed/table"):
        run(tmp_path, splits, model__d_model=32, **OPTIONS)


def test_a_non_finite_loss_stops_before_saving(tmp_path, splits):
    fields = {"optim__name": "sgd", "optim__clip_norm": 0.0, "optim__warmup_steps": 0}
    message = r"step \d+ has loss=.*grad_norm=.*byte_offset=.*the last checkpoint is step 1"
    with pytest.raises(reporter.NonFiniteLossError, match=message):
        run(tmp_path, splits, optim__learning_rate=1e30, train__checkpoint_every=1, **fields)
    saved = Checkpointer(tmp_path, is_read_only=True).steps()
    assert saved == [1]  # the state after step 1 still had a finite loss; none after it is kept
    assert not (tmp_path / "DONE.json").exists()


@pytest.mark.slow
def test_init_from_takes_the_averaged_weights(undisturbed, tmp_path, splits):
    fields = {
        "train__init_from": str(undisturbed),
        "train__n_steps": 1,
        "optim__learning_rate": 0.0,
    }
    run(tmp_path, splits, **fields)
    _, theirs = state_of(undisturbed, **OPTIONS)
    step, mine = state_of(tmp_path, **fields)
    assert step == 1
    for a, b in zip(jax.tree.leaves(mine.params), jax.tree.leaves(theirs.ema), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_memory_goes_around_trained_weights(undisturbed, tmp_path, splits):
    fields = {
        "train__init_from": str(undisturbed),
        "train__n_steps": 1,
        "optim__learning_rate": 0.0,
        "model__name": "recurrent_memory",
        "model__memory__segment_len": 8,
    }
    run(tmp_path, splits, **fields)
    _, theirs = state_of(undisturbed, **OPTIONS)
    _, mine = state_of(tmp_path, **fields)
    assert set(mine.params) == {*theirs.ema, "memory"}
    taken = {**mine.params, "stack": {"0_softmax": mine.params["stack"]["0_armt"]}}
    for name, part in theirs.ema.items():
        for a, b in zip(jax.tree.leaves(taken[name]), jax.tree.leaves(part), strict=True):
            np.testing.assert_array_equal(a, b)
    assert not np.any(mine.params["memory"]["layers"]["0_armt"]["value"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("segment_len", (16, 8))
def test_a_metric_of_nothing_is_not_written(segment_len, tmp_path, splits):
    memory = {"n_memory_tokens": 2, "d_memory": 4, "segment_len": segment_len}
    fields = {f"model__memory__{name}": value for name, value in memory.items()}
    fields |= {"model__name": "recurrent_memory", "train__carry_cache": False}
    run(tmp_path, splits, train__n_steps=1, **fields)
    trained = read_records(tmp_path / "metrics.jsonl")[0]
    assert trained["loss"] > 0
    assert ("memory_gamma" in trained) == (segment_len < 16)  # a row has 16 tokens


def test_init_from_another_model_names_the_field(undisturbed, tmp_path, splits):
    fields = {"train__init_from": str(undisturbed), "model__d_model": 32}
    with pytest.raises(ValueError, match="config.train.init_from.*embed/table"):
        run(tmp_path, splits, **fields)


def test_a_mistake_does_not_claim_the_folder(tmp_path, splits):
    with pytest.raises(ValueError, match="config.optim.name"):
        run(tmp_path, splits, optim__name="adamm", train__n_steps=1)
    assert not (tmp_path / "config.json").exists()
    (tmp_path / "config.json").write_text('{"optim": {"name": "of a run that never saved"}}')
    assert run(tmp_path, splits, train__n_steps=1)["is_finished"]


def test_init_from_nothing(tmp_path, splits):
    with pytest.raises(FileNotFoundError, match="config.train.init_from.*has none"):
        run(tmp_path / "a", splits, train__init_from=str(tmp_path / "none"))


@pytest.mark.parametrize(
    "fields",
    [
        {"train__n_steps": 0},
        {"train__checkpoint_every": 0},
        {"train__n_microbatches": 3},
        {"train__ema_decay": 1.0},
        {"eval__batch_size": 0},
        {"eval__max_bytes": -1},
        {"eval__cache_len": -1},
        {"log__every": 0},
    ],
    ids=str,
)
def test_impossible_settings_name_the_field(fields, tmp_path, splits):
    name = next(iter(fields)).replace("__", ".")
    with pytest.raises(ValueError, match=f"config.{name}"):
        run(tmp_path, splits, **fields)


@pytest.mark.slow
def test_evaluation_runs_when_asked(tmp_path, splits):
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"bits_per_byte": 2.0}

    run(tmp_path, splits, evaluate=evaluate, eval__every=2, train__n_steps=5)
    assert seen == [2, 4, 5]
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records if "eval/bits_per_byte" in r] == [2, 4, 5]


@pytest.mark.slow
def test_the_profiler_window(tmp_path, splits):
    run(tmp_path, splits, train__profile_start=2, train__profile_steps=1, train__n_steps=4)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_goes_on_with_what_it_began_with(tmp_path, splits):
    run(tmp_path, splits, train__n_steps=2, train__checkpoint_every=2)
    path = tmp_path / "inputs.json"
    known = json.loads(path.read_text())
    assert set(known["texts"]) == {"train", "validation"} and known["tokenizer"] == ""
    path.write_text(json.dumps({**known, "texts": {**known["texts"], "validation": "0" * 64}}))
    with pytest.raises(ValueError, match="text of split 'validation' must be the one of the run"):
        run(tmp_path, splits, train__n_steps=4, train__checkpoint_every=2)


def test_an_overwritten_text_is_never_saved(tmp_path, splits):
    config = tiny_config(train__n_steps=4, train__checkpoint_every=2)
    model = build_model(config.model)

    def changed():
        raise ValueError("a text must not change while a run reads it")

    of_config = dataclasses.replace(train_data(config, splits), require_unchanged=changed)
    with pytest.raises(ValueError, match="must not change"):
        loop.train(config, tmp_path, model, of_config, lambda state: {"bits_per_byte": 1.0})
    assert Checkpointer(tmp_path, is_read_only=True).steps() == []
