"""learn: C -> w[j]. Fits one weight per parameter group to the contributions of the learn queries."""

from gradstore.stages.learn.stage import learn, refuse_other_weights

__all__ = ["learn", "refuse_other_weights"]
