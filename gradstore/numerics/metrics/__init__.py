"""How good an attribution is.

Label precision is about topics; tail-patch, LDS and ranking accuracy are about effect; AUC, recall and reciprocal rank say
whether what is known to matter is found.
"""

from gradstore.numerics.metrics.datamodeling import (
    DatamodelingScore,
    SubsetSums,
    compare_datamodeling,
    linear_datamodeling_score,
    subset_mask,
)
from gradstore.numerics.metrics.detection import area_under_curve, compare_detection
from gradstore.numerics.metrics.intervals import Comparison, Interval, mean_interval, paired_interval
from gradstore.numerics.metrics.precision import chance_precision, precision_at_k
from gradstore.numerics.metrics.retrieval import RankSearch, precision_of_ranks, recall_at_k, reciprocal_rank
from gradstore.numerics.metrics.subset_ranking import compare_ranking, ranking_accuracy
from gradstore.numerics.metrics.tail_patch import AdamState, tail_patch

__all__ = [
    "AdamState",
    "Comparison",
    "DatamodelingScore",
    "Interval",
    "RankSearch",
    "SubsetSums",
    "area_under_curve",
    "chance_precision",
    "compare_datamodeling",
    "compare_detection",
    "compare_ranking",
    "linear_datamodeling_score",
    "mean_interval",
    "paired_interval",
    "precision_at_k",
    "precision_of_ranks",
    "ranking_accuracy",
    "recall_at_k",
    "reciprocal_rank",
    "subset_mask",
    "tail_patch",
]
