"""Checksums that do not depend on how an array is cut, and see every change."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longctx_jax.training import checksums as module
from longctx_jax.training.checksums import checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (2, 3, 5)], ids=str)
def test_parts_add_up_to_the_whole(dtype, shape):
    rng = np.random.default_rng(0)
    whole = np.asarray(jnp.asarray(rng.normal(size=shape) * 3, dtype))
    total = 0
    cuts = [[slice(0, n // 2), slice(n // 2, n)] for n in shape]
    for index in np.ndindex(*[2] * len(shape)):
        at = [cut[i] for cut, i in zip(cuts, index, strict=True)]
        total += module._part(whole[tuple(at)], at, shape)
    assert [total % 2**64] == checksums([whole]) == checksums([jnp.asarray(whole)])


@given(st.integers(0, 999), st.integers(1, 2**32 - 1))
def test_any_change_of_an_element_is_seen(place, flip):
    before = np.arange(1000, dtype=np.uint32)
    after = before.copy()
    after[place] ^= np.uint32(flip)
    assert checksums([before]) != checksums([after])


def test_places_count_and_chunks_do_not(monkeypatch):
    values = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    found = checksums([values, values[::-1], np.zeros((3, 0))])
    assert found[0] != found[1] and found[2] == 0
    monkeypatch.setattr(module, "_CHUNK", 16)
    assert checksums([values]) == found[:1]
