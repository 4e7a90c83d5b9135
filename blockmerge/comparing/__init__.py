"""How alike checkpoints are."""

from blockmerge.comparing.results import Comparison, Differences, SimilarityMatrix, SimilarityResult
from blockmerge.comparing.similarity import METHODS, check_method, similarity, similarity_matrix

__all__ = [
    "METHODS",
    "Comparison",
    "Differences",
    "SimilarityMatrix",
    "SimilarityResult",
    "check_method",
    "similarity",
    "similarity_matrix",
]
