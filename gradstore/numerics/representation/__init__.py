"""Attribution by representations (AirRep, arXiv 2505.18513): scores are products of vectors that an encoder makes of texts.

What a set of examples does is a mean of its scores in which large ones count for more (`pooling`), and the encoder is
trained to rank subsets as models do that were retrained on them (`ranking`).
"""

from gradstore.numerics.representation.pooling import AttentionPools, attention_pool
from gradstore.numerics.representation.ranking import ranking_loss, standardised

__all__ = ["AttentionPools", "attention_pool", "ranking_loss", "standardised"]
