"""What several test files share."""

import numpy as np


def assert_close(actual, expected, *, rel_rms: float, max_abs: float | None = None) -> None:
    """Fails unless `actual` equals `expected` up to a relative error.

    Args:
        actual, expected: arrays of one shape.
        rel_rms: largest RMS of the error over RMS of `expected`.
        max_abs: also bounds every single element's error, where one bad element matters.
    """
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, f"shapes differ: {actual.shape} and {expected.shape}"
    assert np.isfinite(expected).all(), "the expected values are not finite"
    error = actual - expected
    ratio = np.sqrt(np.mean(error**2)) / (np.sqrt(np.mean(expected**2)) + 1e-30)
    assert ratio <= rel_rms, f"relative RMS error {ratio:.3e} > {rel_rms:.1e}"
    if max_abs is not None:
        worst = np.max(np.abs(error), initial=0.0)
        assert worst <= max_abs, f"largest error {worst:.3e} > {max_abs:.1e}"
