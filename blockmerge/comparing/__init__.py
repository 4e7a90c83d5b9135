"""How alike checkpoints are, and where a merge comes from."""

from blockmerge.comparing.explain import explain
from blockmerge.comparing.explanation import BlockOrigin, Explanation
from blockmerge.comparing.results import Comparison, Differences, SimilarityMatrix, SimilarityResult
from blockmerge.comparing.similarity import METHODS, similarity, similarity_matrix

__all__ = [
    "METHODS",
    "BlockOrigin",
    "Comparison",
    "Differences",
    "Explanation",
    "SimilarityMatrix",
    "SimilarityResult",
    "explain",
    "similarity",
    "similarity_matrix",
]
