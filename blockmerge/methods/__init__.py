"""What is done to one tensor: pure functions on torch tensors and numbers.

No names, no files, no choice of device.

`merge_method` makes a function a method, and `registry` finds it, neither of which needs torch; the functions
themselves load it when they first compute.
"""

from blockmerge.methods.define import merge_method
from blockmerge.methods.method import Method, MethodLike, Number
from blockmerge.methods.planning import key_of
from blockmerge.methods.registry import (
    BAKE,
    IDENTITIES,
    IDENTITY,
    METHODS,
    PURPOSES,
    find_method,
    purpose_of,
)

__all__ = [
    "BAKE",
    "IDENTITIES",
    "IDENTITY",
    "METHODS",
    "PURPOSES",
    "Method",
    "MethodLike",
    "Number",
    "find_method",
    "key_of",
    "merge_method",
    "purpose_of",
]
