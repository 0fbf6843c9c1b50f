"""A document that is not finite is NaN to its end, in every later call too, and no other one is."""

import numpy as np
import pytest

from longctx_jax.models import build_model
from tests.helpers import assert_close
from tests.laws.cases import (
    CASES,
    MIXTURES,
    SEGMENTS,
    SEQ,
    SIZES,
    TOKENS,
    build,
    laws,
    variables_of,
)

NO_TOKEN = 11  # of a vocabulary of 11: embedded as NaN
BROKEN = TOKENS.copy()
BROKEN[0, 4] = NO_TOKEN  # document 1 of row 0, which ends at 11


def check(model, variables, tokens, broken, segments, splits):
    """Fails unless the broken document of row 0 is NaN from its place on, and nothing else is."""
    expected = np.asarray(model.apply(variables, tokens, segment_ids=segments).logits)
    at = int(np.argmax(np.any(tokens != broken, axis=0)))
    is_broken = np.zeros(tokens.shape, bool)
    is_broken[0] = (segments[0] == segments[0, at]) & (np.arange(tokens.shape[1]) >= at)
    for lengths in splits:
        cache, start, found = model.init_cache(len(tokens), tokens.shape[1]), 0, []
        for length in lengths:
            piece = slice(start, start + length)
            out = model.apply(variables, broken[:, piece], cache, segment_ids=segments[:, piece])
            cache, start = out.cache, piece.stop
            found.append(np.asarray(out.logits))
        found = np.concatenate(found, axis=1)
        assert_close(found[~is_broken], expected[~is_broken], rel_rms=2e-6, max_abs=1e-4)
        yield found, is_broken


@pytest.mark.parametrize("name", laws((*CASES, *MIXTURES)))
def test_a_broken_document_breaks_no_other(name):
    model = build(name)
    splits = ((8, 8, 8), (SEQ,))
    for found, is_broken in check(model, variables_of(model), TOKENS, BROKEN, SEGMENTS, splits):
        assert np.isnan(found[is_broken]).all()


MEMORY = {"segment_len": 4, "n_memory_tokens": 2, "d_memory": 4}
SCHEMES = {
    "armt": {"name": "recurrent_memory", "memory": MEMORY},
    "armt_diagonal": {"name": "recurrent_memory", "memory": MEMORY, "schedule": "diagonal"},
    "armt_among_others": {
        "name": "recurrent_memory",
        "memory": MEMORY,
        "pattern": ("armt", "sliding"),
    },
    "layerwise": {"name": "recurrent_memory", "memory": {**MEMORY, "kind": "layerwise"}},
    "rmt": {"name": "recurrent_memory", "memory": {**MEMORY, "kind": "rmt"}},
    "stagformer": {"name": "stagformer"},
    "stagformer_added": {"name": "stagformer", "stagformer": {"handoff": "add"}},
    "inattention": {"name": "inattention", "inattention": {"n_exact": 3, "max_distance": 8}},
    "inattention_ids": {"name": "inattention", "inattention": {"cache": "ids"}},
    "in_segments": {"segment_len": 4, "schedule": "diagonal", "pattern": ("decay",)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_of_a_scheme_too(name):
    own = {"sliding": {"window_len": 5}, "decay": {"chunk_len": 4}}
    model = build_model({**SIZES, **own, **SCHEMES[name]})
    splits = ((8, 8, 8), (SEQ,))
    results = check(model, variables_of(model), TOKENS, BROKEN, SEGMENTS, splits)
    for found, is_broken in results:
        assert np.isnan(found[0, 4]).all()
        assert np.isnan(found[is_broken]).all() or name.startswith("inattention")
