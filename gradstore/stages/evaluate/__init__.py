"""evaluate: what scores are worth, by measures that do not come from them; values of every query are kept in the store."""

from gradstore.stages.evaluate.datamodeling import ACCURACY, compared_predictions, evaluate_lds
from gradstore.stages.evaluate.methods import described
from gradstore.stages.evaluate.mislabel import evaluate_mislabel
from gradstore.stages.evaluate.recall import evaluate_recall
from gradstore.stages.evaluate.tail_patch import evaluate_tail_patch
from gradstore.stages.evaluate.told import compared, compared_detection, render_evaluation

__all__ = [
    "ACCURACY",
    "compared",
    "compared_detection",
    "compared_predictions",
    "described",
    "evaluate_lds",
    "evaluate_mislabel",
    "evaluate_recall",
    "evaluate_tail_patch",
    "render_evaluation",
]
