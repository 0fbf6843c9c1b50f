"""RWKV and Mamba mixers: cache bytes, initial values, the caches of a block with two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models.config import model_config
from longctx_jax.models.stack import make_blocks
from longctx_jax.nn.blocks import BlockCache
from longctx_jax.nn.mixers.mamba import step_bias_start
from longctx_jax.nn.mixers.rwkv import GroupNorm
from tests.helpers import assert_close, make_normal

SMALL = {"d_model": 16, "n_heads": 2, "n_layers": 3, "d_ff": 8, "dtype": "bfloat16"}
RWKV4 = {"pattern": ("rwkv",), "rwkv": {"version": 4}}
RWKV6 = {"pattern": ("rwkv",), "d_value": 6}
MAMBA1 = {"pattern": ("mamba",), "mamba": {"version": 1, "d_state": 3}}
MAMBA2 = {"pattern": ("mamba",), "mamba": {"d_state": 3, "head_len": 8, "n_groups": 2}}


def make_block(**fields):
    return make_blocks(model_config({**SMALL, **fields}))[0]


@pytest.mark.parametrize(
    ("fields", "state_bytes", "rest_bytes"),
    [
        (RWKV4, 12 * 16, 2 * 16),
        (RWKV6, 4 * 2 * 8 * 6, 2 * 16),
        (MAMBA1, 4 * 32 * 3, 3 * (2 * 32 + 4)),
        (MAMBA2, 4 * 32 * 3, 3 * (2 * (32 + 2 * 2 * 3) + 4)),
    ],
    ids=["rwkv4", "rwkv6", "mamba1", "mamba2"],
)
def test_cache_bytes(fields, state_bytes, rest_bytes):
    cache = make_block(**fields).init_cache(5, max_len=1000)
    state = jax.tree.leaves(cache.state)
    assert all(leaf.dtype == jnp.float32 for leaf in state)
    assert sum(leaf.nbytes for leaf in state) == 5 * state_bytes
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(cache)) == 5 * (state_bytes + rest_bytes)


def test_a_block_has_two_caches_only_if_its_mlp_has_one():
    plain = make_block(**RWKV6).init_cache(2, 1)
    both = make_block(**RWKV6, mlp="rwkv").init_cache(2, 1)
    assert isinstance(both, BlockCache) and type(both.mixer) is type(plain)
    assert both.mlp.shape == (2, 16) and both.mlp.dtype == jnp.bfloat16
    x = jnp.ones((2, 3, 16), jnp.bfloat16)
    with_mlp = make_block(**RWKV6, mlp="rwkv")
    shapes = jax.eval_shape(lambda: with_mlp.init_with_output(jax.random.key(0), x, None)[0])
    assert shapes[1] is None  # no cache given, none made


@pytest.mark.parametrize("version", [4, 6])
def test_decays_start_spread_over_channels_and_depth(version):
    block = make_block(pattern=("rwkv",), rwkv={"version": version, "shift_rank": 2})
    x = jnp.zeros((1, 2, 16), jnp.bfloat16)

    @jax.jit
    def start(layer):
        return block.init(jax.random.key(0), x, None, layer=layer)["params"]["mixer"]

    first, last = start(0), start(2)
    low, high = (-5.0, 3.0) if version == 4 else (-6.0, -1.0)
    for params in (first, last):
        assert params["decay"][0] == low and params["decay"][-1] == pytest.approx(high)
        assert np.all(np.diff(params["decay"]) > 0)
    assert np.all(last["decay"][1:-1] < first["decay"][1:-1])  # deeper layers remember longer
    assert first["shift_key"][0] == 1.0 and np.all(np.diff(first["shift_key"]) < 0)
    assert np.all(last["shift_key"][1:] < first["shift_key"][1:])  # and look back less


def test_steps_start_between_their_bounds():
    with jax.enable_x64(True):
        bias = step_bias_start(jax.random.key(0), (2000,), jnp.float64)
        step = np.log1p(np.exp(np.asarray(bias)))
    assert step.min() >= 1e-3 * (1 - 1e-9) and step.max() <= 1e-1 * (1 + 1e-9)
    assert np.median(np.log10(step)) == pytest.approx(-2.0, abs=0.1)


def test_group_norm_is_by_head():
    x = np.float32(make_normal(0, 2, 3, 4, 5, scale=0.05))
    scale, bias = np.float32(make_normal(1, 4, 5)), np.float32(make_normal(2, 4, 5))
    norm = GroupNorm("float32")
    y = norm.apply({"params": {"scale": scale, "bias": bias}}, x)
    centred = x - x.mean(-1, keepdims=True)
    expected = centred / np.sqrt(centred.var(-1, keepdims=True) + 64e-5) * scale + bias
    assert_close(y, expected, rel_rms=1e-6)
