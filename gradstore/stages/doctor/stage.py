"""The stage: a run is planned, its model loaded, and looked at through a few examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from gradstore.errors import GradstoreError
from gradstore.plan import make_plan
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec
from gradstore.stages.doctor.cost import look_ahead, look_at_coverage, look_at_memory, look_at_speed
from gradstore.stages.doctor.model import load
from gradstore.stages.doctor.numbers import (
    look_at_batches,
    look_at_exactness,
    look_at_inner_products,
    look_for_numbers_that_are_not_finite,
)
from gradstore.stages.doctor.patient import Patient
from gradstore.stages.doctor.report import Check, Diagnosis

# Memory before what makes a process larger than a worker's: gradients that are kept whole.
LOOKS: Final[Mapping[str, Callable[[Patient], Check]]] = {
    "coverage": look_at_coverage,
    "finite": look_for_numbers_that_are_not_finite,
    "memory": look_at_memory,
    "speed": look_at_speed,
    "batches": look_at_batches,
    "exactness": look_at_exactness,
    "inner products": look_at_inner_products,
    "forecast": look_ahead,
}


def doctor(spec: RunSpec, examples: int) -> Diagnosis:
    """Look at a run through the first examples of its train split; no store is touched.

    The data is read and split as featurize does it, so what is wrong with it is found too.

    Raises
    ------
    SpecError, DataError, ResourceError
        If the run cannot be planned, its data cannot be read or its model cannot be loaded.
    """
    splits = make_adapter(spec).examples().splits
    plan = make_plan(spec, splits)
    loaded, matrices = load(spec, plan, splits["train"])
    chosen = splits["train"][:examples]
    patient = Patient(spec=spec, plan=plan, loaded=loaded, matrices=matrices, examples=chosen)
    checks = []
    failures: dict[str, str] = {}
    for name, look in LOOKS.items():
        try:
            checks.append(look(patient))
        except GradstoreError as error:
            # What one look finds out is no reason not to have the others.
            first = failures.setdefault(str(error), name)
            summary = str(error) if first == name else f"fails as {first} does."
            checks.append(Check(name=name, verdict="failed", summary=summary))
    return Diagnosis(
        run=spec.run.name,
        examples=len(patient.examples),
        device=patient.loaded.device,
        precision=patient.loaded.precision,
        checks=tuple(checks),
    )
