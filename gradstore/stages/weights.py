"""Weights w[j] as stages find them, and what is called after them."""

from __future__ import annotations

from typing import Final

import numpy as np

from gradstore.errors import ContractError, NotReadyError
from gradstore.store.artifacts import WeightsArtifact, list_artifacts
from gradstore.store.features import FeatureStore

# Stands for weights that are the same for every group.
UNWEIGHTED: Final = "unweighted"


def ranking_name(kernel: str, weights: str | None) -> str:
    """Name of what a kernel and weights make: of scores, and of rankings by them."""
    return f"{kernel}.{weights or UNWEIGHTED}"


def candidate_names(store: FeatureStore, name: str) -> list[str]:
    """Names of the candidates of which weights were chosen, in the order of their table; they are weights like others."""
    table = open_weights(store, name).read_candidates()
    return [] if table is None else [f"{name}.{place}" for place in range(len(table))]


def open_weights(store: FeatureStore, name: str) -> WeightsArtifact:
    """Open weights, or those that candidates belong to; NotReadyError if they have not been learned to the end."""
    artifact = WeightsArtifact.open(store.storage, name.partition(".")[0])
    if not artifact.is_complete():
        raise NotReadyError(f"{artifact.folder}: not learned to the end. Run `gradstore learn` again.")
    return artifact


def learned_under(store: FeatureStore, kernel: str) -> list[str]:
    """Names of all weights that were learned under a kernel, to the end."""
    return [
        artifact.name
        for artifact in list_artifacts(store.storage)
        if artifact.kind == "weights" and artifact.committed == artifact.total and artifact.settings["kernel"] == kernel
    ]


def read_weights(store: FeatureStore, name: str | None) -> np.ndarray:
    """Read weights, float64 [M], in the order of the train set's groups; without a name 1 / M for each.

    Raises
    ------
    NotReadyError
        If they have not been learned.
    ContractError
        If they are of other groups.
    """
    groups = [array.name for array in store.open_set("train").info.arrays]
    if name is None:
        return np.full(len(groups), 1 / len(groups))
    artifact = open_weights(store, name)
    found = weight_by_group(artifact)
    if place := name.partition(".")[2]:
        candidates = artifact.read_candidates()
        assert candidates is not None, "candidates are named where there are some"
        found = dict(zip(found, candidates["weights"][int(place)].as_py(), strict=True))
    refuse_strange_groups(f"{store.storage.url}/{artifact.folder}", found, groups)
    return np.array([found[group] for group in groups])


def weight_by_group(artifact: WeightsArtifact) -> dict[str, float]:
    """Weight of every group by its name."""
    table = artifact.read()
    return dict(zip(table["group"].to_pylist(), table["weight"].to_pylist(), strict=True))


def refuse_strange_groups(where: str, found: dict[str, float], groups: list[str]) -> None:
    """Make sure that weights are of the groups of the train set.

    Raises
    ------
    ContractError
        Naming one that is in one of them only.
    """
    if set(found) != set(groups):
        strange = sorted(set(found) ^ set(groups))
        raise ContractError(
            f"{where}: its groups are not those of features/train: {strange[0]} is in one of them only ({len(strange)} such "
            "groups). Name weights that were learned on a model of these groups."
        )
