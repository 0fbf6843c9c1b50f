"""Fixtures over the tiny models."""

import pytest

from tests.models.tiny_models import MODELS, TINY


@pytest.fixture(scope="session")
def model_fields():
    """Returns (name, **changes) -> the fields of one of the tiny models."""

    def fields(name, **changes):
        return {**TINY, **MODELS[name], **changes}

    return fields


@pytest.fixture(scope="module", params=MODELS)
def model_name(request):
    """Runs a test for every tiny model."""
    return request.param
