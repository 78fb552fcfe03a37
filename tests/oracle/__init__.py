"""The whole pipeline once more: dense, in float64, with plain loops, sharing no code with gradstore.

Slow on purpose and meant to be read: it is where the expected values of the tests come from. Random draws (projection
matrices, the initial w_raw, the order of visits) are given to it.
"""

from tests.oracle.attribution import (
    contributions,
    das,
    full_contributions,
    full_kernel_products,
    full_self_influence,
    normalized,
    precondition,
    self_influence,
)
from tests.oracle.features import (
    best_rank,
    class_probability,
    diffusion_output,
    gradient,
    noise_levels,
    planted_colouring,
    planted_draw,
    planted_feature,
    project_dense,
    project_sparse,
    project_two_sided,
    sample,
    token_cross_entropy,
)
from tests.oracle.learning import (
    closed_form,
    full_batch,
    judged,
    learn,
    linear_datamodeling_scores,
    loss,
    ranks,
    scores,
    tail_patch,
    top,
)

__all__ = [
    "best_rank",
    "class_probability",
    "closed_form",
    "contributions",
    "das",
    "diffusion_output",
    "full_batch",
    "full_contributions",
    "full_kernel_products",
    "full_self_influence",
    "gradient",
    "judged",
    "learn",
    "linear_datamodeling_scores",
    "loss",
    "noise_levels",
    "normalized",
    "planted_colouring",
    "planted_draw",
    "planted_feature",
    "precondition",
    "project_dense",
    "project_sparse",
    "project_two_sided",
    "ranks",
    "sample",
    "scores",
    "self_influence",
    "tail_patch",
    "token_cross_entropy",
    "top",
]
