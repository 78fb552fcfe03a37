"""learn: C -> w[j]. Fits one weight per parameter group to the contributions of the learn queries."""

from gradstore.stages.learn.stage import learn, learner_settings, refuse_other_weights

__all__ = ["learn", "learner_settings", "refuse_other_weights"]
