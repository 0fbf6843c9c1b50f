"""Every config file builds a model; the files of one comparison differ in what they say."""

import importlib
import pathlib

import jax
import pytest

from longctx_jax.models import build_model

PROJECT = pathlib.Path(__file__).resolve().parent.parent.parent
FILES = sorted(
    path.relative_to(PROJECT).with_suffix("").as_posix().replace("/", ".")
    for path in (PROJECT / "configs").rglob("*.py")
    if path.name not in ("__init__.py", "sweep_tools.py") and path.parent.name != "sweeps"
)


def n_parameters(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def build(name, **changes):
    config = importlib.import_module(name).get_config()
    config.model.update(changes)
    return build_model(config.model)


@pytest.mark.parametrize("name", FILES)
def test_config_builds(name):
    model = build(name)
    assert model.config.pattern and n_parameters(model) > 0


def test_the_quality_sweep_compares_equal_sizes():
    from configs.sweeps import decay_quality

    sizes = []
    for override in decay_quality.get_sweep()[:4]:
        config = importlib.import_module("configs.decay_quality").get_config()
        for field, value in override.items():
            with config.unlocked():
                config.update_from_flattened_dict({field: value})
        sizes.append(n_parameters(build_model(config.model)))
    assert max(sizes) / min(sizes) < 1.005
