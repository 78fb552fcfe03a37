"""The run's model with what computes its features, before there is a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from gradstore.plan import Plan
from gradstore.plan.sizes import AUTO_TOKEN_BUDGET
from gradstore.spec import RunSpec
from gradstore.stages.featurize.components import components
from gradstore.stages.loading import Loaded, load_first, load_model

if TYPE_CHECKING:
    from gradstore.numerics.projection import Matrices
    from gradstore.store.examples import Example


def load(spec: RunSpec, plan: Plan, train: Sequence[Example]) -> tuple[Loaded, Matrices | None]:
    """Return the model, and the principal components that its projection needs, of the examples that the run takes them of.

    They are found here, since featurize keeps them in a store; the directions of Adam are then not looked at.
    """
    from gradstore.numerics.gradients import FeatureExtractor

    projection = plan.projection
    if not projection.needs_matrices:
        return load_first(spec), None
    loaded = load_model(spec)
    parts = [part.key for group in loaded.groups for part in group.parts]
    matrices = components(loaded, projection, parts, train[: projection.pca_rows])  # type: ignore[attr-defined]
    extractor = FeatureExtractor(loaded.model, loaded.groups, projection, seed=spec.run.seed, matrices=matrices)
    made = Loaded(
        **{field.name: getattr(loaded, field.name) for field in fields(loaded)},
        extractor=extractor,
        training_extractor=extractor,
        divisors=None,
    )
    return made, matrices


def token_budget(spec: RunSpec) -> int:
    """Tokens of a batch, as run.toml says or as featurize begins with."""
    asked = spec.features.token_budget
    return AUTO_TOKEN_BUDGET if asked == "auto" else asked
