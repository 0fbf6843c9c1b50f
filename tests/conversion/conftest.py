"""Tiny checkpoints that the reference library wrote, see tests/golden/make_hf_llama.py."""

import pathlib
import shutil

import pytest

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden" / "hf_llama"
CASES = sorted(path.name for path in GOLDEN.iterdir())


@pytest.fixture(params=CASES)
def case(request):
    """Returns the folder of every checkpoint."""
    return GOLDEN / request.param


@pytest.fixture
def checkpoint(tmp_path):
    """Returns name -> a copy of that checkpoint, to be changed."""

    def copy(name):
        return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy
