"""What is done to one tensor: pure functions on torch tensors and numbers. No names, no files, no choice of
device.

The table is in `blockmerge.methods.table`, which needs no torch; the functions themselves do, and are loaded
late.
"""

from blockmerge.methods.own import merge_method
from blockmerge.methods.planning import key_of
from blockmerge.methods.table import METHODS, Method, Number, find_method

__all__ = ["METHODS", "Method", "Number", "find_method", "key_of", "merge_method"]
