"""Artifacts: what stages make from features, each with its settings and the commit records of its units."""

from gradstore.store.artifacts.artifact import ArtifactStatus, list_artifacts, remove_artifact
from gradstore.store.artifacts.contributions import ContributionArtifact, ContributionShape
from gradstore.store.artifacts.kernel import KernelArtifact
from gradstore.store.artifacts.matrices import MatricesArtifact
from gradstore.store.artifacts.queries import QueryArtifact
from gradstore.store.artifacts.staleness import stale_blocks
from gradstore.store.artifacts.tables import ScoresArtifact, WeightsArtifact

__all__ = [
    "ArtifactStatus",
    "ContributionArtifact",
    "ContributionShape",
    "KernelArtifact",
    "MatricesArtifact",
    "QueryArtifact",
    "ScoresArtifact",
    "WeightsArtifact",
    "list_artifacts",
    "remove_artifact",
    "stale_blocks",
]
