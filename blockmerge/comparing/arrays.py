"""The arrays of sums that comparing works with."""

from __future__ import annotations

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
Flags = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
Records = np.ndarray[tuple[int, ...], np.dtype[np.void]]
