"""How far results that are equal in exact arithmetic may differ in float64."""

from collections.abc import Mapping
from typing import Any

import numpy as np

RELATIVE = 1e-10  # of each array's largest element: float64 keeps 1e-16, a sum of some thousand terms loses three digits of it
CANCELLED = 2.0**-45  # of the largest element of all: sums that are 0, such as the gradient of keys' biases, are their rounding


def assert_agree(actual: Mapping[str, Any], expected: Mapping[str, Any], about: object = "") -> None:
    """Compare results by name, floating ones in float64 to ten digits."""
    arrays = {name: np.asarray(each) for name, each in expected.items()}
    largest = {name: np.abs(each).max(initial=0) for name, each in arrays.items() if each.dtype.kind == "f"}
    noise = CANCELLED * max(largest.values(), default=0)
    assert actual.keys() == arrays.keys()
    for name, array in arrays.items():
        other = np.asarray(actual[name])
        assert (other.dtype, other.shape) == (array.dtype, array.shape), f"{name} {about}"
        if name in largest:
            assert np.abs(other - array).max(initial=0) <= max(RELATIVE * largest[name], noise), f"{name} {about}"
        else:
            np.testing.assert_array_equal(other, array, err_msg=f"{name} {about}")
