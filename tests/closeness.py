"""Comparison of arrays with a tolerance relative to their largest value, so that tests pass on every processor."""

from __future__ import annotations

import numpy as np


def largest_gap(found, expected) -> float:
    """Largest absolute difference of two arrays, as a share of the largest absolute value of ``expected``.

    Args:
        found: array or tensor.
        expected: array or tensor that broadcasts to the shape of ``found``; it must have an entry other than 0.
    """
    found, expected = (np.asarray(getattr(x, "detach", lambda x=x: x)(), dtype=np.float64) for x in (found, expected))
    np.broadcast_to(expected, found.shape)
    assert np.isfinite(found).all() and np.isfinite(expected).all(), "a value is not finite"
    assert expected.any(), "all expected values are 0, so no relative tolerance exists; compare with == 0"
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def assert_close(found, expected, tolerance: float = 2e-5) -> None:
    """Fail unless every difference is at most ``tolerance`` times the largest absolute value of ``expected``.

    The default is twice the largest gap that float32 results of the tiny pipelines show between batch sizes, processors and
    numbers of threads, where matrix products sum in another order.
    """
    gap = largest_gap(found, expected)
    assert gap <= tolerance, f"the largest difference is {gap:.2e} of the largest value; {tolerance:.0e} is allowed"


def assert_apart(found, expected, share: float = 1e-3) -> None:
    """Fail if no difference exceeds ``share`` of the largest absolute value of ``expected``."""
    gap = largest_gap(found, expected)
    assert gap > share, f"the largest difference is {gap:.2e} of the largest value; more than {share:.0e} is expected"
