"""What commits units in a log of its own: a member of a feature set, or an artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from gradstore.store.artifacts import (
    ContributionArtifact,
    EmbeddingsArtifact,
    EvaluationArtifact,
    FullKernelArtifact,
    KernelArtifact,
    MatricesArtifact,
    MomentsArtifact,
    PartialsArtifact,
    PatchedArtifact,
    QueryArtifact,
    RetrainedArtifact,
    ScoreMatrixArtifact,
    ScoresArtifact,
    SelfInfluenceArtifact,
    SketchArtifact,
    WeightsArtifact,
)
from gradstore.store.artifacts.artifact import Artifact
from gradstore.store.commits import CommitLog
from gradstore.store.features import FeatureSet
from gradstore.store.layout import ArrayLayout, chunk_path, part_path

# The class of each kind of artifact.
ARTIFACTS: Final[Mapping[str, type[Artifact]]] = {
    made.kind: made
    for made in (
        MatricesArtifact,
        KernelArtifact,
        FullKernelArtifact,
        PartialsArtifact,
        SelfInfluenceArtifact,
        QueryArtifact,
        ContributionArtifact,
        MomentsArtifact,
        ScoreMatrixArtifact,
        SketchArtifact,
        WeightsArtifact,
        ScoresArtifact,
        RetrainedArtifact,
        PatchedArtifact,
        EmbeddingsArtifact,
        EvaluationArtifact,
    )
}

UnitObjects = dict[str, ArrayLayout | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """A log of commit records, and what its units are.

    Attributes
    ----------
    name
        ``features/train/m0``, or the folder of an artifact.
    folder
        What the paths in its records are relative to.
    log
        The records.
    num_units
        How many units are committed when it is complete.
    objects_of
        Every object of a unit, by its path in the folder: of a chunk with its layout.
    erased_of
        Rows of a unit whose example is erased, counted from its first.
    """

    name: str
    folder: str
    log: CommitLog
    num_units: int
    objects_of: Callable[[int], UnitObjects]
    erased_of: Callable[[int], list[int]]


def ledger_of_member(feature_set: FeatureSet, member: str) -> Ledger:
    """Return the blocks of one member of a feature set."""
    info = feature_set.info
    layouts = info.layouts(member)

    def objects_of(block: int) -> UnitObjects:
        chunks: UnitObjects = {chunk_path(path, block, 0): layout for path, layout in layouts.items()}
        return chunks | {part_path(f"{part}/{member}", block): None for part in ("examples", "statistics")}

    return Ledger(
        name=f"{info.folder}/{member}",
        folder=info.folder,
        log=feature_set.of_member(member).log,
        num_units=info.num_blocks,
        objects_of=objects_of,
        erased_of=info.erased_in,
    )


def ledger_of_artifact(artifact: Artifact) -> Ledger:
    """Return the units of an artifact."""
    return Ledger(
        name=artifact.folder,
        folder=artifact.folder,
        log=artifact.log,
        num_units=artifact.info.num_units,
        objects_of=artifact.unit_objects,
        erased_of=lambda _: [],
    )
