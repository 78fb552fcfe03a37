"""contribute: features + spectra -> C[q, n, j], what the learner needs of it, or scores alone."""

from gradstore.stages.contribute.queries import precondition
from gradstore.stages.contribute.span import contribute_span
from gradstore.stages.contribute.stage import contribute

__all__ = ["contribute", "contribute_span", "precondition"]
