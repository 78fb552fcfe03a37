"""What does not go together in one run.toml, told before any work."""

from __future__ import annotations

from gradstore.errors import SpecError
from gradstore.spec import RunSpec

DAS = "das"
# Kernels that are the inverse of a damped Gram matrix: under another one, leverage means nothing.
LEVERAGE_KERNELS = ("block", "full")
# Objectives of the learner that need the lowest scores, too.
LOWEST_OBJECTIVES = ("bottom", "gap")


def refuse_combinations(spec: RunSpec, output: str | None) -> None:
    """Refuse a kernel, normalisation or objective that is not defined for an output function, and norms that are no norms.

    Raises
    ------
    SpecError
        Naming the keys of run.toml.
    """
    normalize = spec.contribute.normalize
    if output == DAS and spec.kernel.kind not in LEVERAGE_KERNELS:
        raise SpecError(
            f'kernel.kind: found "{spec.kernel.kind}" with model.output = "das", which divides by 1 - h_n: the leverage h_n '
            'is that of an inverse Gram matrix. Set kernel.kind = "full" or "block", or another model.output.'
        )
    if output == DAS and normalize != "none":
        raise SpecError(
            f'contribute.normalize: found "{normalize}" with model.output = "das", whose own factor r_n / (1 - h_n) it would '
            "undo. Leave contribute.normalize out."
        )
    if output == DAS and spec.learn.objective in LOWEST_OBJECTIVES:
        raise SpecError(
            f'learn.objective: found "{spec.learn.objective}" with model.output = "das", whose scores are squared in the end: they '
            'have no negative end. Set learn.objective = "top" or "unnormalized".'
        )
    negative = [f"{member} ({eta})" for member, eta in spec.model.etas.items() if eta < 0]
    if normalize != "none" and negative:
        raise SpecError(
            f'contribute.normalize: found "{normalize}" with members of negative eta: {", ".join(negative)}. Norms are sums '
            "over members with their eta, which must be 0 or more. Leave contribute.normalize out."
        )
