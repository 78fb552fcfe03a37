"""score: C + weights -> the train examples that matter most to every eval query, beside the baselines."""

from gradstore.stages.score.stage import score

__all__ = ["score"]
