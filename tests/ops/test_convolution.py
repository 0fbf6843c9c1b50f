"""The short convolution against its definition, one term after another."""

import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.ops.convolution import short_convolution
from tests.helpers import assert_close, make_normal

BATCH, SEQ, MODEL = 2, 9, 3


def definition(x, kernel, documents):
    y = np.zeros_like(x)
    for b in range(BATCH):
        for t in range(SEQ):
            for j in range(len(kernel)):
                if t - j >= 0 and documents[b, t - j] == documents[b, t]:
                    y[b, t] += kernel[j] * x[b, t - j]
    return y


@pytest.mark.parametrize("width", [1, 2, 4, 12])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_equals_the_definition_at_any_cut(width, cut):
    x, kernel = make_normal(0, BATCH, SEQ, MODEL), make_normal(1, width, MODEL)
    documents = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2], [5, 5, 6, 6, 6, 6, 6, 6, 7]], np.int32)
    inputs = [jnp.asarray(a, jnp.float32) for a in (x, kernel)]
    ids = jnp.asarray(documents)
    expected = definition(x, kernel, documents)
    if cut == 0:
        y, _ = short_convolution(*inputs, documents=ids)
        assert_close(y, expected, rel_rms=1e-6)
        return
    first, history = short_convolution(inputs[0][:, :cut], inputs[1], documents=ids[:, :cut])
    past = np.full((BATCH, width - 1), -1, np.int32)
    all_ids = jnp.concatenate([jnp.asarray(past), ids[:, :cut]], axis=1)
    rest, _ = short_convolution(
        inputs[0][:, cut:],
        inputs[1],
        history,
        documents=ids[:, cut:],
        history_documents=all_ids[:, cut:],
    )
    assert_close(jnp.concatenate([first, rest], axis=1), expected, rel_rms=1e-6)
