"""The layers of the diagonal schedule on several devices: the same numbers, few messages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from longctx_jax.models.schedules import run_stack
from tests.helpers import (
    assert_trees_close,
    make_normal,
    random_variables,
    run_on_devices,
    run_two_processes,
)

N_SEGMENTS, BATCH, WIDTH = 3, 2, 4


def cell(params, x, cache):
    """A layer whose output and cache depend on both inputs."""
    y = jnp.tanh(x @ params + cache[:, None])
    return x + y, 0.5 * cache + jnp.mean(y, axis=1), {"sum": jnp.sum(y)}


def make_inputs(n_layers):
    """Returns float32 (params, x_segments, caches)."""
    shapes = (n_layers, WIDTH, WIDTH), (N_SEGMENTS, BATCH, 5, WIDTH), (n_layers, BATCH, WIDTH)
    return tuple(make_normal(i, *shape).astype(np.float32) for i, shape in enumerate(shapes))


def make_mesh(n_devices):
    return jax.make_mesh(
        (n_devices,),
        ("layers",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:n_devices],
    )


def spread(tree, mesh):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("layers"))
    return jax.device_put(tree, sharding)


def loss(params, x, caches, layer_axis):
    options = {"schedule": "diagonal", "layer_axis": layer_axis}
    out = run_stack((cell, cell), params, x, caches, **options)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(out)), out


def check_values_gradients_and_messages():
    """Eight layers in a pattern of two, on two devices: two repeats each."""
    params, x, caches = make_inputs(8)
    params, caches = (params[0::2], params[1::2]), (caches[0::2], caches[1::2])
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    expected = step(params, x, caches, "")
    mesh = make_mesh(2)
    with jax.set_mesh(mesh):
        inputs = spread(params, mesh), x, spread(caches, mesh)
        compiled = step.lower(*inputs, "layers").compile()
        found = compiled(*inputs)
    assert_trees_close(found, expected, rel_rms=2e-6)
    messages = re.findall(
        r"(all-gather|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text()
    )
    assert messages and set(messages) == {"collective-permute"}  # no weight travels
    assert found[0][1][1][0].sharding.spec == jax.sharding.PartitionSpec("layers")


def check_a_model_with_memory_on_eight_devices():
    fields = {
        "name": "recurrent_memory",
        "n_layers": 8,
        "d_model": 8,
        "n_heads": 2,
        "vocab_size": 11,
        "d_ff": 8,
        "memory": {"segment_len": 4, "n_memory_tokens": 2, "d_memory": 4},
    }
    alone = build_model({**fields, "schedule": "sequential"})
    model = build_model({**fields, "schedule": "diagonal", "layer_axis": "layers"})
    variables = random_variables(lambda: alone.init(jax.random.key(0)))
    tokens = np.random.default_rng(0).integers(0, 11, (2, 14))
    cache = alone.init_cache(2, 14)
    expected = alone.apply(variables, tokens, cache)
    mesh = make_mesh(8)
    params = variables["params"]
    with jax.set_mesh(mesh):
        params = {
            **params,
            "stack": spread(params["stack"], mesh),
            "memory": {**params["memory"], "layers": spread(params["memory"]["layers"], mesh)},
        }
        found = model.apply({**variables, "params": params}, tokens, cache)
    assert_trees_close(found.logits, expected.logits, rel_rms=1e-5)
    assert_trees_close(found.cache.layers, expected.cache.layers, rel_rms=1e-5)


def check_uneven_devices():
    with jax.set_mesh(make_mesh(3)), pytest.raises(ValueError, match="3 devices and 4 repeats"):
        run_stack(cell, *make_inputs(4), schedule="diagonal", layer_axis="layers")


@pytest.mark.slow
def test_eight_devices():
    program = """
from tests.models import test_pipeline as t
t.check_uneven_devices()
t.check_values_gradients_and_messages()
t.check_a_model_with_memory_on_eight_devices()
"""
    run_on_devices(program)


def test_mistakes_name_the_axis():
    params, x, caches = make_inputs(4)
    run = {"schedule": "diagonal", "layer_axis": "depth"}
    with pytest.raises(ValueError, match="axis of the mesh: got 'depth'"):
        run_stack(cell, params, x, caches, **run)
    with pytest.raises(ValueError, match="needs the diagonal schedule"):
        run_stack(cell, params, x, caches, schedule="sequential", layer_axis="layers")
    with pytest.raises(ValueError, match="config.model.layer_axis"):
        build_model({"layer_axis": "layers"})


@pytest.mark.slow
def test_two_processes():
    for out in run_two_processes("tests.models.two_processes"):
        assert "devices=4 processes=2" in out
        assert float(out.split("worst=")[1]) < 1e-6
