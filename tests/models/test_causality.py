"""No output depends on a later token, nor on another document: full Jacobians in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from longctx_jax.models.stack import apply_stack
from longctx_jax.nn.contract import Documents
from tests.helpers import in_float64, make_normal, random_variables

SEQ, D_MODEL = 7, 8
SMALL = {"d_model": D_MODEL, "n_heads": 2, "dtype": "float64", "n_layers": 2, "d_ff": 8}
STACKS = {
    "softmax": {},
    "gqa_relative": {"n_kv_heads": 1, "softmax": {"position": "relative"}},
    "sliding": {"pattern": ("sliding",), "sliding": {"window_len": 3}},
    "decay": {"pattern": ("decay",), "decay": {"chunk_len": 3}},
    "vq": {
        "pattern": ("vq",),
        "n_kv_heads": 1,
        "vq": {"window_len": 2, "block_len": 2, "codebook_size": 3},
    },
    "rwkv4": {
        "pattern": ("rwkv",),
        "mlp": "rwkv",
        "rwkv": {"version": 4, "chunk_len": 3},
    },
    "rwkv6": {
        "pattern": ("rwkv",),
        "mlp": "rwkv",
        "rwkv": {"chunk_len": 3, "shift_rank": 2, "decay_rank": 2},
    },
    "mamba1": {
        "pattern": ("mamba",),
        "mlp": "none",
        "mamba": {"version": 1, "d_state": 2, "chunk_len": 3, "implementation": "chunked"},
    },
    "mamba2": {
        "pattern": ("mamba",),
        # The reverse rule of other forms leaves rounding, 1e-18, where the derivative is 0.
        "mamba": {"d_state": 2, "head_len": 8, "chunk_len": 3, "implementation": "two_pass"},
    },
    "mixed_in_segments": {
        "pattern": ("decay", "sliding"),
        "decay": {"chunk_len": 2},
        "sliding": {"window_len": 3},
        "segment_len": 3,
    },
}


FAST = ("gqa_relative", "decay", "vq")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in STACKS],
)
@in_float64
def influence(request):
    """Returns (reset or None) -> [seq, seq], the size of d output[t] / d input[s]."""
    model = build_model({**SMALL, **STACKS[request.param]})
    variables = random_variables(lambda: model.init(jax.random.key(0)))
    state = variables["model_state"].get("stack", {})
    x = make_normal(0, SEQ, D_MODEL)

    @jax.jit
    def jacobian(documents):
        def run(x):
            stack = variables["params"]["stack"], state
            y, _, _ = apply_stack(
                model.config, *stack, x[None], documents, None, key=None, train=False
            )
            return y[0]

        return jnp.sqrt(jnp.sum(jax.jacrev(run)(jnp.asarray(x)) ** 2, axis=(1, 3)))

    @in_float64
    def run(reset):
        if reset is None:
            return request.param, np.asarray(jacobian(None))
        reset = jnp.asarray(reset, bool)[None]
        documents = Documents(jnp.cumsum(reset, axis=1, dtype=jnp.int32), reset)
        return request.param, np.asarray(jacobian(documents))

    return run


def test_the_past_and_only_the_past_matters(influence):
    name, sizes = influence(None)
    for t in range(SEQ):
        for s in range(SEQ):
            reach = 2 * 2 if name == "sliding" else SEQ  # two layers of window 3
            if s > t or t - s > reach:
                assert sizes[t, s] == 0.0, f"output {t} depends on input {s}"
            else:
                assert sizes[t, s] > 1e-9, f"output {t} does not depend on input {s}"


def test_documents_are_separate(influence):
    document = np.array([0, 0, 1, 1, 1, 2, 2])
    name, sizes = influence(np.diff(document, prepend=0) > 0)
    for t in range(SEQ):
        for s in range(SEQ):
            if s > t or document[s] != document[t]:
                assert sizes[t, s] == 0.0, f"output {t} depends on input {s}"
            else:
                assert sizes[t, s] > 1e-9, f"output {t} does not depend on input {s}"
