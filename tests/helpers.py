"""What several test files share."""

import contextlib
import functools
import os
import socket
import subprocess
import sys

import jax
import numpy as np

from tests.tiny import PROJECT


def make_normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Returns float64 standard normal numbers times scale, the same for the same seed and shape."""
    return scale * np.random.default_rng([seed, *shape]).standard_normal(shape)


def in_float64(function):
    """Runs the decorated function with 64-bit types enabled."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            return function(*args, **kwargs)

    return wrapped


def random_variables(function, *args, scale: float = 0.3):
    """Returns float32 random numbers shaped like function(*args), without compiling it."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(function, *args))
    arrays = [make_normal(i, *leaf.shape, scale=scale) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [array.astype(np.float32) for array in arrays])


def run_on_devices(program: str, n_devices: int = 8) -> None:
    """Runs Python text in a process of its own with this many CPU devices; fails if it fails."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(n_devices)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def run_two_processes(module: str) -> list[str]:
    """Returns what `python -m module ID PORT` prints as each of two processes that find others."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([sys.executable, "-m", module, str(i), port], cwd=PROJECT, **pipes)
        for i in range(2)
    ]
    printed = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]
        printed.append(out)
    return printed


def sub_jaxprs(jaxpr):
    """Yields a jaxpr and every jaxpr inside its equations."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sub_jaxprs(inner)


def assert_trees_close(actual, expected, *, rel_rms: float) -> None:
    """`assert_close` leaf by leaf; fails unless both trees have one structure."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, left), right in pairs:
        try:
            assert_close(left, right, rel_rms=rel_rms)
        except AssertionError as error:
            raise AssertionError(f"{jax.tree_util.keystr(path)}: {error}") from None


def assert_close(actual, expected, *, rel_rms: float, max_abs: float | None = None) -> None:
    """Fails unless `actual` equals `expected` up to a relative error.

    Args:
        actual, expected: arrays of one shape.
        rel_rms: largest RMS of the error over RMS of `expected`.
        max_abs: also bounds every single element's error, where one bad element matters.
    """
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"shapes differ: {actual.shape} and {expected.shape}"
    assert np.isfinite(expected).all(), "the expected values are not finite"
    if not expected.size:
        return
    error = actual - expected
    ratio = np.sqrt(np.mean(error**2)) / (np.sqrt(np.mean(expected**2)) + 1e-30)
    assert ratio <= rel_rms, f"relative RMS error {ratio:.3e} > {rel_rms:.1e}"
    if max_abs is not None:
        worst = np.max(np.abs(error), initial=0.0)
        assert worst <= max_abs, f"largest error {worst:.3e} > {max_abs:.1e}"


def lower_for_cuda(function, *arguments) -> str:
    """Returns the text of function lowered for an H200, on a machine without one.

    Args:
        function: to be jitted and lowered.
        *arguments: `jax.ShapeDtypeStruct`s or None.
    """
    mesh = contextlib.nullcontext()
    fields = {"device_kind": "NVIDIA H200", "num_cores": 132}
    if jax.__version_info__ >= (0, 11):  # the older one takes the newest device by itself
        device = jax.sharding.AbstractDevice(**fields, platform="gpu")
        types = (jax.sharding.AxisType.Auto,)
        abstract = jax.sharding.AbstractMesh((1,), ("x",), types, abstract_device=device)
        mesh = jax.sharding.use_abstract_mesh(abstract)
    with mesh:
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text()
