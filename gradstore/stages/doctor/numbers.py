"""Looks at what the features are: finite, the same in every batch, exact, and good for inner products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradstore.stages.doctor.exact import Comparison
from gradstore.stages.doctor.patient import Patient
from gradstore.stages.doctor.report import Check, Verdict
from gradstore.stages.featurize.prepare import INVARIANCE

# Largest distance of features from autograd's gradient in float32, as `Comparison.errors` has it.
EXACTNESS = 1e-4
# What rounding may move a row by when its batch mates change; beyond INVARIANCE it is no rounding.
ROUNDING = {"float32": 1e-4, "bfloat16": 1e-1}
# Inner products of features whose correlation with those of gradients is less say little about them.
AGREEMENT = 0.5
# A correlation of fewer pairs is chance; five examples make ten.
LEAST_PAIRS = 10
SHOWN = 3


def look_for_numbers_that_are_not_finite(patient: Patient) -> Check:
    """Losses and gradients of all examples."""
    count = len(patient.examples)
    told = [f"{patient.examples[row].example_id}: {what}" for row, what in sorted(patient.invalid.items())]
    allowed = patient.spec.features.max_invalid
    summary = f"losses and gradients of all {count} examples are finite."
    if told:
        summary = (
            f"{'; '.join(told[:SHOWN])}. {len(told)} of {count} examples are not finite, features.max_invalid allows "
            f'{allowed:.2%}. Mend the data or the model, or set model.precision = "float32".'
        )
    return Check(
        name="finite",
        verdict="ok" if not told else "failed" if len(told) > allowed * count else "warning",
        summary=summary,
        figures={"rows": count, "invalid": told},
    )


def look_at_batches(patient: Patient) -> Check:
    """Whether the features of an example are the same alone and among others."""
    sound, precision = patient.sound, patient.loaded.precision
    if len(sound) < 2:
        return _not_looked("batches", "it takes two examples that are finite")
    together = patient.loaded.before_factors(sound)
    worst, where, whose = 0.0, "", ""
    for row, example in enumerate(sound):
        for name, alone in patient.loaded.before_factors([example]).items():
            norm = max(float(np.linalg.norm(alone[0])), float(np.linalg.norm(together[name], axis=1).max()))
            distance = float(np.linalg.norm(together[name][row] - alone[0])) / (norm or 1.0)
            if not distance <= worst:
                worst, where, whose = distance, name, example.example_id
    verdict: Verdict = "ok" if worst <= ROUNDING[precision] else "warning"
    summary = f"features alone and in a batch of {len(sound)} differ by {worst:.1e} at most"
    if not worst <= INVARIANCE[precision]:
        verdict = "failed"
        summary += (
            f" ({whose} in {where}), so the model mixes the examples of a batch. Leave the module out with "
            "features.groups.exclude, or set features.token_budget = 1: batches of one example"
        )
    elif verdict == "warning":
        summary += f" ({whose} in {where}), more than rounding alone"
    figures = {"worst": worst, "group": where, "example": whose, "rows": len(sound)}
    return Check(name="batches", verdict=verdict, summary=f"{summary}.", figures=figures)


def look_at_exactness(patient: Patient) -> Check:
    """Features beside projections of the gradient that autograd computes of one example."""
    compared = patient.compared
    if not compared:
        return _not_looked("exactness", "no example is finite")
    worst = _worst_errors(compared)
    order = sorted(worst, key=lambda name: (worst[name] <= EXACTNESS, -worst[name]))
    wrong = [name for name in order if not worst[name] <= EXACTNESS]
    shown = ", ".join(f"{name} {worst[name]:.1e}" for name in order[:SHOWN])
    summary = f"features of {len(compared)} examples differ from autograd's gradients by {worst[order[0]]:.1e} at most"
    if wrong:
        summary = (
            f"features of {len(wrong):,} of {len(worst):,} groups differ from autograd's gradients by more than "
            f"{EXACTNESS:.0e}: {shown}. The model uses these parameters in a way that is not seen: leave them out with "
            "features.groups.exclude"
        )
    return Check(
        name="exactness",
        verdict="failed" if wrong else "ok",
        summary=f"{summary}.",
        figures={"worst": worst[order[0]], "examples": len(compared), "groups": worst, "wrong": wrong},
    )


def look_at_inner_products(patient: Patient) -> Check:
    """How well inner products of features stand for those of gradients, over pairs of examples."""
    compared = patient.compared
    if len(compared) < 2:
        return _not_looked("inner products", "it takes two finite examples whose gradients fit the memory")
    pairs = [(row, other) for row in range(len(compared)) for other in range(row + 1)]
    exact_P = np.array([compared[row].exact_product(compared[other]) for row, other in pairs])
    found_P = np.array([compared[row].feature_product(compared[other]) for row, other in pairs])
    apart_P = np.array([row != other for row, other in pairs])
    # Norms count too: they are what a bias of the projection shows in most.
    ratio = float(exact_P @ found_P) / (float(exact_P @ exact_P) or 1.0)
    correlation = _correlation(exact_P[apart_P], found_P[apart_P])
    told = "" if correlation is None else f", with a correlation of {correlation:.3f} over {int(apart_P.sum())} pairs"
    poor = correlation is not None and correlation < AGREEMENT
    advice = " That is little: raise the projection's rank or features." if poor else ""
    return Check(
        name="inner products",
        verdict="warning" if poor else "ok",
        summary=f"those of features are {ratio:.3f} of those of gradients{told}.{advice}",
        figures={"ratio": ratio, "correlation": correlation, "examples": len(compared)},
    )


def _worst_errors(compared: Sequence[Comparison]) -> dict[str, float]:
    """By group, the largest error of all examples."""
    worst: dict[str, float] = {}
    for item in compared:
        for name, error in item.errors.items():
            # NaN is worse than anything.
            worst[name] = worst[name] if error <= worst.get(name, 0.0) and name in worst else error
    return worst


def _correlation(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """Pearson's, or None of fewer than LEAST_PAIRS or where one of both is constant."""
    if len(ours) < LEAST_PAIRS or not (ours.std() > 0 and theirs.std() > 0):
        return None
    return float(np.corrcoef(ours, theirs)[0, 1])


def _not_looked(name: str, why: str) -> Check:
    return Check(name=name, verdict="warning", summary=f"not looked at: {why}.")
