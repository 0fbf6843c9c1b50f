"""Fixtures of the data tests: a tiny stream, a config stand-in, real data where it is present."""

import os
import pathlib
import types

import numpy as np
import pytest

from longctx_jax import data
from longctx_jax.data.streams import concatenate


@pytest.fixture
def make_config():
    """Returns a function making a stand-in for `config.data` with the base defaults."""

    def make(**fields):
        defaults = {
            "name": "text",
            "data_dir": "",
            "files": (),
            "validation_files": (),
            "test_files": (),
            "text_field": "",
            "validation_fraction": 0.05,
            "test_fraction": 0.05,
            "download": False,
        }
        return types.SimpleNamespace(**(defaults | fields))

    return make


@pytest.fixture(autouse=True)
def no_data_dir(monkeypatch, request):
    """Keeps the machine's data folder out of every test that does not ask for it."""
    if "real_data_dir" not in request.fixturenames:
        monkeypatch.delenv("LONGCTX_DATA_DIR", raising=False)


@pytest.fixture
def real_data_dir():
    """Returns the folder of real data sets, or skips."""
    beside = pathlib.Path(__file__).parents[2].parent / "shared" / "data"
    folder = pathlib.Path(os.environ.get("LONGCTX_DATA_DIR") or beside)
    if not folder.is_dir():
        pytest.skip("no real data: set LONGCTX_DATA_DIR")
    return folder


@pytest.fixture
def stream():
    """Returns a stream of 1,000 random bytes in documents of uneven length."""
    raw = np.random.default_rng(0).integers(0, 256, 1000, np.uint8).tobytes()
    return concatenate("s", [raw[:3], raw[3:200], raw[200:201], raw[201:640], raw[640:]])


@pytest.fixture
def tokenizer():
    return data.build_tokenizer("bytes")
