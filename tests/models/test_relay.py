"""A sequence spread over devices: values, gradients and caches of one device, for every mixer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from longctx_jax.models.schedules import run_stack
from tests.helpers import assert_trees_close, random_variables, run_on_devices
from tests.models.test_pipeline import cell, make_inputs

SMALL = {"n_layers": 4, "d_model": 16, "n_heads": 2, "vocab_size": 11, "d_ff": 16}
MEMORY = {"segment_len": 4, "n_memory_tokens": 2, "d_memory": 4}
MODELS = {
    "decay": {"name": "decay"},
    "vq": {"name": "transformer_vq", "vq": {"codebook_size": 5, "window_len": 4}},
    "mamba": {
        "name": "transformer",
        "pattern": ("mamba", "softmax"),
        "mamba": {"d_state": 4, "head_len": 4},
    },
    "mamba_1": {
        "name": "transformer",
        "pattern": ("mamba",),
        "mamba": {"version": 1, "d_state": 4},
    },
    "rwkv": {
        "name": "transformer",
        "pattern": ("rwkv", "sliding"),
        "mlp": "rwkv",
        "rwkv": {"shift_rank": 4, "decay_rank": 4},
    },
    "armt": {"name": "recurrent_memory", "memory": MEMORY},
    "layerwise": {"name": "recurrent_memory", "memory": {**MEMORY, "kind": "layerwise"}},
    "stagformer": {"name": "stagformer"},
}
SEQ = 32


def check(name):
    """A mesh of 2 x 4 devices: rows x tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (2, SEQ)).astype(np.int32)
    ids = np.cumsum(rng.random((2, SEQ)) < 0.1, axis=1).astype(np.int32)
    fields = {**SMALL, **MODELS[name]}
    alone, spread = build_model(fields), build_model({**fields, "sequence_axis": "sequence"})
    variables = random_variables(lambda: alone.init(jax.random.key(0)), scale=0.2)

    def loss(model, params, tokens, ids, cache):
        given = {**variables, "params": params}
        out = model.hidden(given, tokens, cache, segment_ids=ids, train=True)
        return jnp.mean(out.hidden**2 * jnp.arange(out.hidden.shape[-1])), out

    step = jax.jit(jax.value_and_grad(loss, argnums=1, has_aux=True), static_argnums=0)
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=types)
    for cache in (None, alone.init_cache(2, SEQ)):
        expected = step(alone, variables["params"], tokens, ids, cache)
        with jax.set_mesh(mesh):
            sharding = jax.NamedSharding(mesh, jax.P("data", "sequence"))
            here = jax.device_put((tokens, ids), sharding)
            found = step(spread, variables["params"], *here, cache)
        assert found[0][1].hidden.sharding.spec == jax.P("data", "sequence")
        assert_trees_close(found, expected, rel_rms=3e-5)


def check_uneven():
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=types, devices=jax.devices()[:2])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="2 devices and 3 segments"):
        run_stack(cell, *make_inputs(4), sequence_axis="sequence")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_eight_devices(name):
    run_on_devices(f"from tests.models import test_relay as t\nt.check({name!r})")


@pytest.mark.slow
def test_uneven_segments_are_named():
    run_on_devices("from tests.models import test_relay as t\nt.check_uneven()", n_devices=2)


def test_mistakes_name_the_axis():
    params, x, caches = make_inputs(4)
    with pytest.raises(ValueError, match="axis of the mesh: got 'tokens'"):
        run_stack(cell, params, x, caches, sequence_axis="tokens")
    both = {"schedule": "diagonal", "sequence_axis": "s", "layer_axis": "l"}
    with pytest.raises(ValueError, match="neither layer_axis nor n_active"):
        run_stack(cell, params, x, caches, **both)
    for fields in (
        {"name": "inattention", "sequence_axis": "s"},
        {"name": "recurrent_memory", "memory": {"kind": "rmt"}, "sequence_axis": "s"},
    ):
        with pytest.raises(ValueError, match=r"config\.model\.sequence_axis"):
            build_model({**SMALL, **fields})
