"""Models that are trained on subsets of the train set: what scores are measured by, and what an encoder learns from."""

from gradstore.stages.retraining.halves import KEY, lds_outputs, section_of
from gradstore.stages.retraining.models import Retrained, averaged, folder_of
from gradstore.stages.retraining.signal import Signal, make_signal, read_signal

__all__ = [
    "KEY",
    "Retrained",
    "Signal",
    "averaged",
    "folder_of",
    "lds_outputs",
    "make_signal",
    "read_signal",
    "section_of",
]
