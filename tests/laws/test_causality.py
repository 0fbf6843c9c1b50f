"""No output depends on a later token, nor on another document: full Jacobians in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longctx_jax.models import build_model
from longctx_jax.models.stack import apply_stack
from longctx_jax.nn.contract import Documents
from tests.helpers import in_float64, make_normal, random_variables
from tests.laws.cases import CASES, MIXTURES, build, fields_of, laws

SEQ, D_MODEL = 7, 16
# The reverse rules of some fast forms leave rounding, 1e-18, where the derivative is 0.
NOTHING = 1e-15


def jacobian_of(model):
    """Returns (reset or None) -> [seq, seq], the size of d output[t] / d input[s]."""
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
            return np.asarray(jacobian(None))
        reset = jnp.asarray(reset, bool)[None]
        documents = Documents(jnp.cumsum(reset, axis=1, dtype=jnp.int32), reset)
        return np.asarray(jacobian(documents))

    return run


@pytest.fixture(scope="module", params=laws((*CASES, *MIXTURES, "mixed in segments")))
@in_float64
def influence(request):
    name, _, cut = request.param.partition(" in ")
    return jacobian_of(build(name, dtype="float64", segment_len=3 if cut else 0))


def check(sizes, may_see):
    """Fails unless outputs depend on nothing they may not see, on themselves and on their past."""
    for t in range(SEQ):
        for s in range(SEQ):
            if not may_see[t, s]:
                assert sizes[t, s] <= NOTHING, f"output {t} depends on input {s}"
            else:
                assert sizes[t, s] > 1e-9, f"output {t} does not depend on input {s}"


def test_the_past_and_only_the_past_matters(influence):
    check(influence(None), np.tril(np.ones((SEQ, SEQ), bool)))


def test_documents_are_separate(influence):
    document = np.array([0, 0, 1, 1, 1, 2, 2])
    sizes = influence(np.diff(document, prepend=0) > 0)
    check(sizes, np.tril(document[:, None] == document[None]))


@pytest.mark.slow
@in_float64
def test_two_layers_of_a_window_of_three_reach_four_tokens_back():
    fields = fields_of("sliding-sliding", dtype="float64", sliding={"window_len": 3})
    sizes = jacobian_of(build_model(fields))(None)
    distance = np.arange(SEQ)[:, None] - np.arange(SEQ)
    check(sizes, (distance >= 0) & (distance <= 4))
