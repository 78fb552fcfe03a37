"""A store as xarray shows it: datasets of named, lazy arrays; torch is needed only where stored values are other than float32.

datasets   the functions that a user calls
arrays     what xarray reads when values are asked for
"""

from gradstore.opening.datasets import open_contributions, open_features, open_scores

__all__ = ["open_contributions", "open_features", "open_scores"]
