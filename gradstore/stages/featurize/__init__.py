"""featurize: model + data -> features."""

from gradstore.stages.featurize.stage import featurize

__all__ = ["featurize"]
