"""How alike checkpoints are."""

from blockmerge.comparing.loras import LoraSimilarity, lora_similarity, squares_of
from blockmerge.comparing.results import Comparison, Differences, SimilarityMatrix, SimilarityResult
from blockmerge.comparing.similarity import METHODS, check_method, similarity, similarity_matrix

__all__ = [
    "METHODS",
    "Comparison",
    "Differences",
    "LoraSimilarity",
    "SimilarityMatrix",
    "SimilarityResult",
    "check_method",
    "lora_similarity",
    "similarity",
    "similarity_matrix",
    "squares_of",
]
