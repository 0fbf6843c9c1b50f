"""Checkpoints: round trips, damage, other models, full disks, retention."""

import collections
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.training import checkpoint
from longctx_jax.training.checkpoint import Checkpointer, CheckpointError, require_restored
from longctx_jax.training.state import TrainState

CONFIG = {"model": {"name": "transformer", "d_model": 4}}


def make_state(step: int = 0, width: int = 300) -> TrainState:
    values = jax.random.normal(jax.random.key(step), (40, width))
    return TrainState(
        step=jnp.asarray(step, jnp.int32),
        params={"w": values, "b": jnp.zeros((3,), jnp.bfloat16)},
        opt_state=(({"w": values * 2},), ()),
        ema={},
        model_state={},
        cache={},
        key=jax.random.key(7),
    )


def template(**kw):
    return jax.eval_shape(lambda: make_state(**kw))


@pytest.fixture
def run(tmp_path):
    """A work directory with checkpoints of steps 1, 2 and 3."""
    saver = Checkpointer(tmp_path, keep_latest=3)
    for step in (1, 2, 3):
        saver.save(step, make_state(step), CONFIG)
    saver.close()
    return tmp_path


def assert_equal(a: TrainState, b: TrainState):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert x.dtype == y.dtype


def largest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def damage(run: pathlib.Path, step: int, how: str) -> None:
    path = largest_file(run / "checkpoints" / str(step))
    data = bytearray(path.read_bytes())
    if how == "flipped byte":
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "missing file":
        path.unlink()
    else:
        (run / "checkpoints" / str(step) / "meta" / "metadata").write_text("{not json")


def test_round_trip(run):
    restored = Checkpointer(run, is_read_only=True).restore(2, template())
    assert_equal(restored.state, make_state(2))
    assert restored.data == {"next_index": 2, "fingerprint": ""}
    assert restored.meta["config"] == CONFIG
    assert restored.meta["versions"]["jax"] == jax.__version__
    assert isinstance(restored.state, TrainState)


def test_a_part_of_the_state(run):
    part = Checkpointer(run, is_read_only=True).restore_latest({"params": template().params})
    assert part is not None and part.step == 3
    np.testing.assert_array_equal(part.state["params"]["w"], make_state(3).params["w"])


@pytest.mark.parametrize("how", ["flipped byte", "truncated", "missing file", "bad description"])
def test_a_damaged_checkpoint_falls_back_loudly(run, how, caplog):
    damage(run, 3, how)
    saver = Checkpointer(run, keep_latest=3)
    restored = saver.restore_latest(template())
    assert restored is not None and restored.step == 2
    assert_equal(restored.state, make_state(2))
    assert "falling back" in caplog.text and "step 3" in caplog.text
    assert not (run / "checkpoints" / "3").exists()
    assert len(list((run / "checkpoints_damaged").iterdir())) == 1  # kept, not deleted
    saver.save(3, make_state(3), CONFIG)  # the same step can be saved again
    saver.close()
    assert saver.steps() == [1, 2, 3]


def test_reading_only_moves_nothing(run):
    damage(run, 3, "truncated")
    reader = Checkpointer(run, is_read_only=True)
    restored = reader.restore_latest(template())
    assert restored is not None and restored.step == 2
    assert (run / "checkpoints" / "3").exists()
    with pytest.raises(CheckpointError, match=r"3 is damaged.*use another step: \[1, 2, 3\]"):
        reader.restore(3, template())


def test_all_damaged_is_an_error(run):
    for step in (1, 2, 3):
        damage(run, step, "missing file")
    for _ in range(2):  # a second start must not take the folder for a fresh one
        with pytest.raises(CheckpointError, match=r"all of \[1, 2, 3\].*damaged"):
            Checkpointer(run).restore_latest(template())


def test_another_model_is_named_and_nothing_is_moved(run):
    saver = Checkpointer(run)
    with pytest.raises(ValueError, match=r"params/w is float32\[40, 300\], not float32\[40, 8\]"):
        saver.restore_latest(template(width=8))
    other = template().replace(params={"v": jnp.zeros(2)})
    with pytest.raises(ValueError, match="params/v is missing.*params/w is not in this model"):
        saver.restore_latest(other)
    assert saver.steps() == [1, 2, 3]


def test_unknown_step_names_the_known(run):
    with pytest.raises(FileNotFoundError, match=r"got 9; there are \[1, 2, 3\]"):
        Checkpointer(run, is_read_only=True).restore(9, template())


def test_no_checkpoint(tmp_path):
    assert Checkpointer(tmp_path).restore_latest(template()) is None
    with pytest.raises(FileNotFoundError, match="scripts.train"):
        Checkpointer(tmp_path / "none", is_read_only=True)


def test_a_full_disk_leaves_the_older_ones(run, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    saver = Checkpointer(run, keep_latest=3)
    with pytest.raises(CheckpointError, match=r"checkpoints \[1, 2, 3\] are intact.*free some"):
        saver.save(4, make_state(4), CONFIG)


def test_a_failing_write_leaves_the_older_ones(run):
    resource = pytest.importorskip("resource")
    saver = Checkpointer(run, keep_latest=3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # larger files cannot be written
    try:
        with pytest.raises(CheckpointError, match=r"checkpoints \[1, 2, 3\] are intact"):
            saver.save(4, make_state(4), CONFIG)
            saver.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = Checkpointer(run, keep_latest=3)
    restored = again.restore_latest(template())
    assert restored is not None and restored.step == 3
    again.save(4, make_state(4), CONFIG)
    again.close()
    assert again.steps() == [2, 3, 4]


def test_retention(tmp_path):
    saver = Checkpointer(tmp_path, keep_latest=2, keep_every=3)
    for step in range(1, 8):
        saver.save(step, make_state(step, width=2), CONFIG)
    saver.close()
    assert saver.steps() == [3, 6, 7]
    with pytest.raises(ValueError, match="config.train.keep_latest"):
        Checkpointer(tmp_path, keep_latest=0)


def test_missing_values_are_not_shapes():
    with pytest.raises(ValueError, match="no value for 1 leaves: \\['a'\\]"):
        require_restored({"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": jnp.zeros(1)})


def test_only_this_file_knows_the_format(run):
    meta = Checkpointer(run, is_read_only=True).read_meta(1)
    assert meta["format"] == checkpoint.FORMAT
    assert meta["leaves"]["params/w"]["shape"] == [40, 300]
