"""Array types that the package shares."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def floats(value: ArrayLike) -> FloatArray:
    """`value` as an array of float64."""
    return np.asarray(value, dtype=np.float64)
