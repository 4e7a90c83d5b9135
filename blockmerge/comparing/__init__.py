"""How alike checkpoints are."""

from blockmerge.comparing.results import Comparison, Differences, SimilarityMatrix, SimilarityResult
from blockmerge.comparing.similarity import METHODS, similarity, similarity_matrix

__all__ = [
    "METHODS",
    "Comparison",
    "Differences",
    "SimilarityMatrix",
    "SimilarityResult",
    "similarity",
    "similarity_matrix",
]
