"""The picture of the diagonal schedule."""

import numpy as np
import pytest

from longctx_jax.figures.schedule import IDLE, USEFUL, draw_schedule, step_grid
from longctx_jax.models.schedules.diagonal import diagonal_cells


@pytest.mark.parametrize(
    "sizes", [(12, 6, 1, 3), (3, 4, 2, 2), (1, 5, 1, 4), (8, 1, 1, 4)], ids=str
)
def test_picture_shows_every_cell_once_and_what_idles(sizes):
    n_segments, n_repeats, pattern_len, _ = sizes
    grid = step_grid(*sizes)
    assert grid.shape == (n_repeats * pattern_len, n_segments + n_repeats * pattern_len - 1)
    for layer, row in enumerate(grid == USEFUL):
        np.testing.assert_array_equal(np.nonzero(row)[0], layer + np.arange(n_segments))
    assert np.sum(grid == USEFUL) + np.sum(grid == IDLE) == diagonal_cells(*sizes)
    assert draw_schedule(*sizes).axes
