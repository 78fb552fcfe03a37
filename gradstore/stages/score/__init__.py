"""score: C + weights -> the train examples that matter most to every eval query, beside the baselines."""

from gradstore.stages.score.stage import UNWEIGHTED, score

__all__ = ["UNWEIGHTED", "score"]
