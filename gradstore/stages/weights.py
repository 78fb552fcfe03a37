"""Weights w[j] as stages find them, and what is called after them."""

from __future__ import annotations

from typing import Final

from gradstore.errors import NotReadyError
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.features import FeatureStore

# Stands for weights that are the same for every group.
UNWEIGHTED: Final = "unweighted"


def ranking_name(kernel: str, weights: str | None) -> str:
    """Name of what a kernel and weights make: of scores, and of rankings by them."""
    return f"{kernel}.{weights or UNWEIGHTED}"


def open_weights(store: FeatureStore, name: str) -> WeightsArtifact:
    """Open weights; NotReadyError if they have not been learned to the end."""
    artifact = WeightsArtifact.open(store.storage, name)
    if not artifact.is_complete():
        raise NotReadyError(f"{artifact.folder}: not learned to the end. Run `gradstore learn` again.")
    return artifact
