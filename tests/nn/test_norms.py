"""Norms: float32 arithmetic on bfloat16 input, and their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.nn.norms import make_norm
from tests.helpers import assert_close, make_normal

WIDTH = 24


def formula(kind, x, scale, bias):
    if kind == "rms":
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-6) * scale + bias


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("dtype", "rel_rms"), [("float32", 1e-6), ("bfloat16", 4e-3)])
def test_formula(kind, dtype, rel_rms):
    # A large mean: variance in bfloat16 would be off by half.
    x = jnp.asarray(make_normal(0, 3, 5, WIDTH) + 8.0, dtype)
    norm = make_norm(kind, dtype)
    names = {"rms": ["scale"], "layer": ["bias", "scale"]}[kind]
    params = norm.init(jax.random.key(0), x)["params"]
    assert sorted(params) == names
    assert all(p.shape == (WIDTH,) and p.dtype == jnp.float32 for p in params.values())
    params = {name: jnp.float32(make_normal(i, WIDTH)) for i, name in enumerate(names)}
    y = norm.apply({"params": params}, x)
    assert y.dtype == dtype
    params = {name: np.asarray(p, np.float64) for name, p in params.items()}
    expected = formula(kind, np.asarray(x, np.float64), params["scale"], params.get("bias"))
    assert_close(y, expected, rel_rms=rel_rms)


def test_float32_arithmetic_on_bfloat16_input():
    x = jnp.asarray(make_normal(0, 3, 5, WIDTH) + 8.0, jnp.bfloat16)
    for kind in ("rms", "layer"):
        y, _ = make_norm(kind, "float32").init_with_output(jax.random.key(0), x)
        assert y.dtype == jnp.float32
        assert_close(y, formula(kind, np.asarray(x, np.float64), 1.0, 0.0), rel_rms=1e-6)


def test_zeros_have_a_finite_gradient():
    norm = make_norm("rms", "float32")
    x = jnp.zeros((2, WIDTH))
    variables = jax.jit(norm.init)(jax.random.key(0), x)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(norm.apply(variables, x))))(x)
    assert np.isfinite(gradient).all()
