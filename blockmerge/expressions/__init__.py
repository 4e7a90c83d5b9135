"""What a tensor is: stored bytes, or something made from other tensors.

Frozen, and without torch until computed.
"""

from blockmerge.expressions.arrangements import Arrangement, Joined, Part, Reshaped, Transposed, is_arranged
from blockmerge.expressions.changed import Changed, Stepped, unmeasured
from blockmerge.expressions.changes import Change, Contracted, Hadamard, Kronecker, LowRank
from blockmerge.expressions.computed import (
    Cast,
    Clipped,
    Dequantised,
    Figures,
    Gathered,
    Held,
    Merged,
    Scaled,
)
from blockmerge.expressions.expression import Expression, Locality, simplify
from blockmerge.expressions.leaves import Known, Source, Stored
from blockmerge.expressions.program import (
    Program,
    Programs,
    dequantised_in,
    leaves_of,
    methods_of,
    operands_of,
    products_in,
)
from blockmerge.expressions.squares import Squares
from blockmerge.expressions.weight_changes import (
    Decomposed,
    Generalised,
    Rescaled,
    Rotated,
    WeightChange,
)

__all__ = [
    "Arrangement",
    "Cast",
    "Change",
    "Changed",
    "Clipped",
    "Contracted",
    "Decomposed",
    "Dequantised",
    "Expression",
    "Figures",
    "Gathered",
    "Generalised",
    "Hadamard",
    "Held",
    "Joined",
    "Known",
    "Kronecker",
    "Locality",
    "LowRank",
    "Merged",
    "Part",
    "Program",
    "Programs",
    "Rescaled",
    "Reshaped",
    "Rotated",
    "Scaled",
    "Source",
    "Squares",
    "Stepped",
    "Stored",
    "Transposed",
    "WeightChange",
    "dequantised_in",
    "is_arranged",
    "leaves_of",
    "methods_of",
    "operands_of",
    "products_in",
    "simplify",
    "unmeasured",
]
