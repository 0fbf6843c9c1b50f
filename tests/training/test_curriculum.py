"""Rows get longer as training goes on, and hold the same tokens in the same order."""

import numpy as np
import pytest

from longctx_jax.training.curriculum import check_curriculum, cut_rows, row_len
from tests.tiny import tiny_config


def make(**fields):
    options = {"train__carry_cache": False, "data__seq_len": 16}
    return tiny_config(**{**options, **{f"train__{k}": v for k, v in fields.items()}})


def test_stages():
    config = make(curriculum_starts=(0, 3), curriculum_lens=(4, 8))
    check_curriculum(config)
    assert [row_len(config, step) for step in range(5)] == [4, 4, 4, 8, 8]
    assert row_len(make(), 7) == 16


def test_rows_are_cut_in_order():
    batch = {"tokens": np.arange(32).reshape(2, 16)}
    np.testing.assert_array_equal(cut_rows(batch, 8)["tokens"], np.arange(32).reshape(4, 8))


MISTAKES = [
    ({"curriculum_starts": (0,)}, "equally long"),
    ({"curriculum_starts": (2,), "curriculum_lens": (4,)}, "must rise from 0"),
    ({"curriculum_starts": (0, 0), "curriculum_lens": (4, 8)}, "must rise from 0"),
    ({"curriculum_starts": (0,), "curriculum_lens": (5,)}, "must divide config.data.seq_len"),
    (
        {"curriculum_starts": (0,), "curriculum_lens": (4,), "carry_cache": True},
        "set carry_cache to False",
    ),
]


def test_rows_with_a_question_at_the_end_stay_whole():
    config = make(curriculum_starts=(0,), curriculum_lens=(4,))
    config.data.name = "recall_passkey"
    with pytest.raises(ValueError, match="would cut questions from their facts"):
        check_curriculum(config)


@pytest.mark.parametrize(("fields", "message"), MISTAKES, ids=str)
def test_mistakes_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        check_curriculum(make(**fields))
