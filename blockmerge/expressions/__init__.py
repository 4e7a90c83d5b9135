"""What a tensor is: stored bytes, or something made from other tensors.

Frozen, and without torch until computed.
"""

from blockmerge.expressions.arrangements import Arrangement, Joined, Part, Reshaped, Transposed, is_arranged
from blockmerge.expressions.computed import Cast, Clipped, Figures, Gathered, Merged, Scaled
from blockmerge.expressions.expression import Expression, Locality, simplify
from blockmerge.expressions.leaves import Known, Source, Stored
from blockmerge.expressions.program import Program, Programs, leaves_of, methods_of, operands_of

__all__ = [
    "Arrangement",
    "Cast",
    "Clipped",
    "Expression",
    "Figures",
    "Gathered",
    "Joined",
    "Known",
    "Locality",
    "Merged",
    "Part",
    "Program",
    "Programs",
    "Reshaped",
    "Scaled",
    "Source",
    "Stored",
    "Transposed",
    "is_arranged",
    "leaves_of",
    "methods_of",
    "operands_of",
    "simplify",
]
