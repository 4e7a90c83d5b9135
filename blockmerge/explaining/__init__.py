"""Where a merge comes from."""

from blockmerge.explaining.explain import explain
from blockmerge.explaining.explanation import BlockOrigin, Explanation

__all__ = ["BlockOrigin", "Explanation", "explain"]
