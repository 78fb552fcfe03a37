"""synth: a run of which is known what it has to find, for scale tests and for sizing a cluster."""

from gradstore.stages.synth.settings import SynthSettings
from gradstore.stages.synth.stage import make_folder

__all__ = ["SynthSettings", "make_folder"]
