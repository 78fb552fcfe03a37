"""Per-example gradients of a model's parameter groups, projected, in one forward and one backward pass."""

from gradstore.numerics.gradients.extractor import Covariance, Extracted, FeatureExtractor
from gradstore.numerics.gradients.layers import canonical_matrices, model_parameters

__all__ = ["Covariance", "Extracted", "FeatureExtractor", "canonical_matrices", "model_parameters"]
