"""Every mixer trains: resumed runs equal undisturbed ones bit for bit, eight devices one device."""

import pytest

from longctx_jax import data
from longctx_jax.models import build_model
from longctx_jax.runs.train import train_data
from longctx_jax.training import loop
from longctx_jax.training.checkpoint import Checkpointer
from tests.laws import mesh
from tests.laws.cases import CASES, MIXERS, config_of


def train(workdir, name, n_steps):
    config = config_of(name, train__n_steps=n_steps, train__checkpoint_every=2)
    splits = data.load_source(config.data)
    model = build_model(config.model, MIXERS)
    of_config = train_data(config, splits)
    return loop.train(config, workdir, model, of_config, lambda state: {"bits_per_byte": 1.0})


def arrays_of(workdir):
    """Returns the last checkpoint's arrays by path, as they were saved."""
    saved = Checkpointer(workdir, is_read_only=True)
    leaves = saved.read_meta(saved.steps()[-1])["leaves"]
    return saved.steps()[-1], leaves


@pytest.mark.slow  # the loop has its own fast one
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_undisturbed_one(name, tmp_path):
    train(tmp_path / "whole", name, 4)
    train(tmp_path / "cut", name, 2)
    train(tmp_path / "cut", name, 4)
    assert arrays_of(tmp_path / "cut") == arrays_of(tmp_path / "whole")


@pytest.fixture(scope="module")
def losses():
    """What one device and eight find, for all mixers and ways of spreading."""
    return {n: mesh.run_all(CASES, n_devices=n) for n in (1, 8)}


@pytest.mark.slow
@pytest.mark.parametrize("spread", mesh.MESHES)
@pytest.mark.parametrize("name", CASES)
def test_eight_devices_train_as_one(name, spread, losses):
    alone, together = (losses[n][f"{name} {spread}"] for n in (1, 8))
    assert together == pytest.approx(alone, rel=1e-12), name  # float64: seen 1e-15
