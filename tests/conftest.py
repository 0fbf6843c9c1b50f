"""Settings of the whole test suite; runs before jax is imported."""

import gc
import os
import pathlib

ON_GPU = bool(os.environ.get("LONGCTX_TEST_GPU"))
if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Tests spend their time compiling: this halves it, and changes no result beyond rounding. Set
    # XLA_FLAGS (even to the empty string) to test what users run; GPU runs never get it.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
# One device: tests that need several start their own process with its own setting.
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")

import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Checks the shapes in the signatures of ops, in tests only. Tower: an int may stand for a float.
TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
jaxtyping.install_import_hook("longctx_jax.ops", TYPECHECKER)

PROJECT = pathlib.Path(__file__).resolve().parent.parent


# Every compiled program holds memory maps, and Linux allows a process 65,530 of them: past that,
# compilation crashes. A whole slow suite in two processes gets there.
MAX_MAPS = 30_000


@pytest.fixture(autouse=True)
def few_compiled_programs():
    """Drops all compiled programs after a test when they hold too many memory maps."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


def pytest_collection_modifyitems(config, items):
    """Skips GPU tests elsewhere; refuses a GPU run that would skip or pretend."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not ON_GPU:
        reason = "needs a GPU: run `make gpu-check` on a machine that has one"
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=reason))
    elif gpu_items:
        import jax

        if jax.default_backend() != "gpu":
            raise pytest.UsageError(
                f"LONGCTX_TEST_GPU needs a GPU: jax runs on {jax.default_backend()}; "
                "install the extra cuda13, or unset the variable"
            )


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """Folder with the real texts `enwik8_4m/` and `pg19_mini/`; skips where there is none."""
    named = os.environ.get("LONGCTX_DATA_DIR")
    folder = pathlib.Path(named) if named else PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs real text: {folder} is missing; set LONGCTX_DATA_DIR")
    return folder
