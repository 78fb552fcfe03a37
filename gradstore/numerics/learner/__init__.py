"""Algorithm 1 of arXiv 2506.05647: one weight per parameter group, learned without labels from the contributions.

`learn_weights` is the reference: it reads C once per epoch. `learn_certified` gives the same from a few reads in all,
however many epochs and settings there are.
"""

from gradstore.numerics.learner.algorithm import (
    INITIAL_DEVIATION,
    Descent,
    LearnedWeights,
    Visit,
    initial_raw_weights,
    initial_weights,
    learn_weights,
    loss_and_gradient,
    placing_scores,
    refuse_non_finite,
    visit_order,
    visit_query,
)
from gradstore.numerics.learner.certificate import Certificate, Certification
from gradstore.numerics.learner.certified import CertifiedWeights, learn_certified
from gradstore.numerics.learner.closed_form import closed_form_weights
from gradstore.numerics.learner.full_batch import FullBatchSettings, FullBatchWeights, learn_full_batch
from gradstore.numerics.learner.judging import gain, judge
from gradstore.numerics.learner.kept import KeptRows, Piece, best_rows
from gradstore.numerics.learner.noise import deviations, noisy, with_noise
from gradstore.numerics.learner.settings import ENDS, LearnerSettings, Objective

__all__ = [
    "ENDS",
    "INITIAL_DEVIATION",
    "Certificate",
    "Certification",
    "CertifiedWeights",
    "Descent",
    "FullBatchSettings",
    "FullBatchWeights",
    "KeptRows",
    "LearnedWeights",
    "LearnerSettings",
    "Objective",
    "Piece",
    "Visit",
    "best_rows",
    "closed_form_weights",
    "deviations",
    "gain",
    "initial_raw_weights",
    "initial_weights",
    "judge",
    "learn_certified",
    "learn_full_batch",
    "learn_weights",
    "loss_and_gradient",
    "noisy",
    "placing_scores",
    "refuse_non_finite",
    "visit_order",
    "visit_query",
    "with_noise",
]
