"""The features of a synthetic run, drawn: its model's gradients to the last bit, at the speed of writing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from gradstore.adapters.synthetic import Synthetic, places_of
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec
from gradstore.stages.loading import THREADS, Batch

if TYPE_CHECKING:
    from gradstore.store.examples import Example
    from gradstore.store.features import FeatureArray, FeatureSet

# Projections that keep a gradient as it is, where their rank is no less than its sides.
KEEPING = ("identity", "logra")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedSource:
    """What stands for the model of a synthetic run where its features are its whole gradients."""

    adapter: Synthetic
    arrays: tuple[FeatureArray, ...]
    device: str = "cpu"

    def compute(self, examples: Sequence[Example], *, training: bool = False, covariances: bool = False) -> Batch:
        """Features of one batch, and the covariances of its factors if asked for; outputs are 0."""
        planted, rows = self.adapter.planted, places_of(examples)
        groups = {name: place for place, name in enumerate(self.adapter.names)}
        features: dict[str, np.ndarray] = {}
        sums: dict[str, tuple[np.ndarray, np.ndarray, int]] = {}
        for array in self.arrays:
            gradients_BOT = self.adapter.output_gradients(groups[array.name], rows)
            features[array.name] = planted.features(gradients_BOT)
            if covariances:
                sums |= {part.part: planted.covariances(gradients_BOT) for part in array.parts}
        return Batch(outputs=np.zeros(len(examples)), features=features, covariances=sums)

    def facts(self) -> dict[str, object]:
        """What drew a block, for its record."""
        versions = {name: version(name) for name in ("gradstore", "numpy")}
        return {"versions": versions, "device": self.device, "precision": "float32", "threads": THREADS}


def find_planted(spec: RunSpec, feature_set: FeatureSet) -> PlantedSource | None:
    """What draws the features of a set of a synthetic run; None if they are another run's, or not its whole gradients."""
    adapter = make_adapter(spec, feature_set.member)
    if not isinstance(adapter, Synthetic) or spec.features.projection.get("kind") not in KEEPING:
        return None
    names, size = {*adapter.names}, adapter.features
    whole = all(
        array.name in names and array.features == size and len(array.parts) <= 1 for array in feature_set.info.arrays
    )
    return PlantedSource(adapter=adapter, arrays=feature_set.info.arrays) if whole else None
