"""Artifacts: what stages make from features, each with its settings and the commit records of its units."""

from gradstore.store.artifacts.artifact import ArtifactStatus, list_artifacts, remove_artifact
from gradstore.store.artifacts.contributions import BlockWriter, ContributionArtifact, ContributionShape
from gradstore.store.artifacts.embeddings import EmbeddingsArtifact
from gradstore.store.artifacts.full_kernel import FullKernelArtifact, FullKernelShape
from gradstore.store.artifacts.kernel import KernelArtifact, SpectraShape
from gradstore.store.artifacts.matrices import MatricesArtifact
from gradstore.store.artifacts.moments import MomentsArtifact, MomentsShape, SpanMoments, span_edges
from gradstore.store.artifacts.partials import PartialsArtifact, remove_partials
from gradstore.store.artifacts.queries import QueryArtifact, QueryShape
from gradstore.store.artifacts.rounding import ContributionDtype, QueryRounding
from gradstore.store.artifacts.score_matrix import ScoreMatrixArtifact, ScoreShape
from gradstore.store.artifacts.self_influence import SelfInfluenceArtifact, SelfInfluenceShape
from gradstore.store.artifacts.sketch import SketchArtifact, SketchRows, SketchShape
from gradstore.store.artifacts.staleness import stale_blocks
from gradstore.store.artifacts.tables import (
    EvaluationArtifact,
    PatchedArtifact,
    RetrainedArtifact,
    ScoresArtifact,
    WeightsArtifact,
)

__all__ = [
    "ArtifactStatus",
    "BlockWriter",
    "ContributionArtifact",
    "ContributionDtype",
    "ContributionShape",
    "EmbeddingsArtifact",
    "EvaluationArtifact",
    "FullKernelArtifact",
    "FullKernelShape",
    "KernelArtifact",
    "MatricesArtifact",
    "MomentsArtifact",
    "MomentsShape",
    "PartialsArtifact",
    "PatchedArtifact",
    "QueryArtifact",
    "QueryRounding",
    "QueryShape",
    "RetrainedArtifact",
    "ScoreMatrixArtifact",
    "ScoreShape",
    "ScoresArtifact",
    "SelfInfluenceArtifact",
    "SelfInfluenceShape",
    "SketchArtifact",
    "SketchRows",
    "SketchShape",
    "SpanMoments",
    "SpectraShape",
    "WeightsArtifact",
    "list_artifacts",
    "remove_artifact",
    "remove_partials",
    "span_edges",
    "stale_blocks",
]
