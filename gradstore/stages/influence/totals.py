"""What every train row does to the eval queries, to one of them, or to itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradstore.errors import NotReadyError, SpecError
from gradstore.stages.building import BuiltContributions
from gradstore.stages.contributions import Contributions, Reads, ScoreMatrix, StoredContributions, valid_rows_of
from gradstore.stages.known_kernels import choose_kernel, query_spec
from gradstore.stages.progress import Progress
from gradstore.stages.spectra import require_current
from gradstore.stages.weights import ranking_name, read_weights
from gradstore.store.artifacts import ContributionArtifact, SelfInfluenceArtifact, list_artifacts
from gradstore.store.features import FeatureStore

_QUERIES: Final = "eval"
# What tells that there are scores under a kernel, or what they are built from; names of matrices end in those of weights.
_MADE_OF_QUERIES: Final = ("contributions", "score_matrix", "queries")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Which influence is meant.

    Attributes
    ----------
    kernel
        Name of the kernel, which may be left out where the store has what is needed of one only.
    weights
        Name of the weights; None for none.
    query
        Id of the one eval query that counts; None for all together.
    on_itself
        Whether it is that of every row on itself, in which no query takes part.
    """

    kernel: str | None = None
    weights: str | None = None
    query: str | None = None
    on_itself: bool = False

    def __post_init__(self) -> None:
        if self.on_itself and self.query is not None:
            raise SpecError(f"--query: found {self.query!r} with --self, in which no query takes part. Leave out one.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Influence:
    """Influence of every valid train row.

    Attributes
    ----------
    store, kernel, asked
        What it was computed from.
    queries
        How many queries were summed: none in self-influence.
    rows, totals
        Numbers of the rows [n], ascending, and their influence, float64 [n].
    """

    store: FeatureStore
    kernel: str
    asked: Asked
    queries: int
    rows: np.ndarray
    totals: np.ndarray


def find_influence(store_url: str, asked: Asked) -> Influence:
    r"""Sum scores over the valid eval queries, or take the self-influence of every row.

    .. math:: \tau(Q, n) = \sum_{q \in Q} S[q, n], \qquad \tau(n, n) = \sum_j \tau_j(n, n)

    Under weights the second is the sum of w_j tau_j(n, n); of members it is that over all, each with its eta, as in C. Under
    the identity tau(n, n) is the squared norm of the gradient.

    Parameters
    ----------
    store_url
        The store.
    asked
        Which of them, under which kernel and weights.

    Raises
    ------
    NotReadyError
        If contributions, or scores in their place, or self-influence, or weights are not there.
    SpecError
        If the kernel has to be chosen, or the query is unknown or has no valid features.
    """
    store = FeatureStore.open(store_url)
    return _on_itself(store, asked) if asked.on_itself else _on_queries(store, asked)


def scores_on_queries(
    store: FeatureStore, asked: Asked
) -> tuple[str, np.ndarray, np.ndarray, Iterator[tuple[int, np.ndarray, np.ndarray]]]:
    """Name of the kernel; which eval queries count, bool [Q]; valid rows; and (first query, rows [n], scores [q, n])."""
    kernel = _chosen(store, asked)
    rows_N, scores = _open(store, kernel, asked.weights)
    return kernel, _counted(store, asked.query), rows_N, scores


def _on_queries(store: FeatureStore, asked: Asked) -> Influence:
    kernel, valid_Q, rows_N, scores = scores_on_queries(store, asked)
    total_N = np.zeros(store.open_set("train").info.rows)
    for first, place_N, s_QN in scores:
        total_N[place_N] += s_QN[valid_Q[first : first + len(s_QN)]].sum(0)
    queries = int(valid_Q.sum())
    return Influence(store=store, kernel=kernel, asked=asked, queries=queries, rows=rows_N, totals=total_N[rows_N])


def _on_itself(store: FeatureStore, asked: Asked) -> Influence:
    kernel = _chosen(store, asked)
    train = store.open_set("train").info
    weights_M = None if asked.weights is None else read_weights(store, asked.weights)
    etas = {member["name"]: member["eta"] for member in store.run.get("model", {}).get("members", [])}
    total_N = np.zeros(train.rows)
    for member in train.members:
        artifact = SelfInfluenceArtifact.open(store.storage, kernel, member)
        if not artifact.is_complete():
            raise NotReadyError(
                f"{store.storage.url}/{artifact.folder}: {len(artifact.missing_units())} of {artifact.info.num_units} chunks "
                "are missing. Run `gradstore self-influence` again: it computes those."
            )
        require_current(artifact, store)
        found = [artifact.read_totals(row, weights_M) for row in range(artifact.shape.num_rows)]
        total_N += etas.get(member, 1.0) * np.concatenate(found)
    # A row that is not valid in some member is NaN.
    rows_N = np.flatnonzero(np.isfinite(total_N))
    return Influence(store=store, kernel=kernel, asked=asked, queries=0, rows=rows_N, totals=total_N[rows_N])


def _chosen(store: FeatureStore, asked: Asked) -> str:
    """Name of the kernel that is asked for, or of the only one."""
    known = set()
    for artifact in list_artifacts(store.storage):
        first, _, second = artifact.name.partition("/")
        if asked.on_itself and artifact.kind == "self_influence":
            known.add(first)
        elif not asked.on_itself and second.partition("/")[0] == _QUERIES and artifact.kind in _MADE_OF_QUERIES:
            known.add(first.partition(".")[0])
    what = "self-influence" if asked.on_itself else "contributions or scores"
    if not known:
        command = "self-influence" if asked.on_itself else "contribute"
        lacking = "self-influence" if asked.on_itself else "contributions of eval"
        raise NotReadyError(f"{store.storage.url}: holds no {lacking}. Run `gradstore {command}` first.")
    if asked.kernel is None and len(known) == 1:
        return known.pop()
    if asked.kernel not in known:
        found = "is missing" if asked.kernel is None else f"found {asked.kernel}"
        raise SpecError(f"--kernel: {found}; {store.storage.url} has {what} of: {', '.join(sorted(known))}.")
    return asked.kernel


def _counted(store: FeatureStore, query: str | None) -> np.ndarray:
    """Which eval queries count, bool [Q]: the valid ones, or the one of an id."""
    evaluated = store.open_set(_QUERIES)
    valid_Q = np.zeros(evaluated.info.rows, bool)
    valid_Q[valid_rows_of(store, _QUERIES)] = True
    if query is None:
        return valid_Q
    named_Q = np.array([example == query for example in evaluated.read_column("example_id")])
    if not named_Q.any():
        raise SpecError(
            f"--query: found {query!r}; {store.storage.url}/{evaluated.info.folder} has no example of this id."
        )
    if not (named_Q & valid_Q).any():
        raise SpecError(f"--query: {query!r} has no valid features, and so no scores. Choose another query.")
    return named_Q & valid_Q


def _open(
    store: FeatureStore, kernel: str, weights: str | None
) -> tuple[np.ndarray, Iterator[tuple[int, np.ndarray, np.ndarray]]]:
    """Numbers of the valid rows; and (first query, rows [n], scores [q, n]), float64, of C or of scores in its place.

    Where neither is kept, C is built from features, which is a pass over them.
    """
    from gradstore.numerics.scores import scores_of, transformed

    kept = ContributionArtifact.find_named(store.storage, kernel, _QUERIES)
    matrices = [item.name for item in list_artifacts(store.storage) if item.kind == "score_matrix"]
    if kept is None and any(name.partition(".")[0] == kernel for name in matrices):
        matrix = ScoreMatrix.open(store, ranking_name(kernel, weights), _QUERIES)
        transform = matrix.artifact.settings["transform"]
        return matrix.valid_rows(), (
            (0, rows_N, transformed(s_QN.astype(np.float64), transform)) for rows_N, s_QN in matrix.read_blocks()
        )
    contributions: Contributions
    if kept is None:
        spec = query_spec(store, choose_kernel(store, kernel), model=None, device="cpu")
        contributions = BuiltContributions.open(spec, store, _QUERIES)
    else:
        contributions = StoredContributions.open(store, kernel, _QUERIES)
    transform, weights_M = contributions.settings["transform"], read_weights(store, weights)
    reads = Reads(contributions, Progress(quiet=True), "influence")
    return contributions.valid_rows(), (
        (first, rows_N, scores_of(c_QNM, weights_M, transform)) for first, rows_N, c_QNM in reads.read()
    )
