"""doctor: is what a run would compute right, and how long will it take? On a few examples, without a store."""

from gradstore.stages.doctor.report import Check, Diagnosis, render_diagnosis
from gradstore.stages.doctor.stage import doctor

__all__ = ["Check", "Diagnosis", "doctor", "render_diagnosis"]
