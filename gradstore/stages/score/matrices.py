"""Full score matrices beside the rankings: S [queries, examples] under every weighting, from one read of C."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gradstore.plan.sizes import LEARNER_BUFFERS
from gradstore.stages.contributions import StoredContributions
from gradstore.stages.progress import Progress
from gradstore.stages.score.sources import Method
from gradstore.stages.weights import open_weights, read_weights
from gradstore.store.alignment import aligned
from gradstore.store.artifacts import ContributionArtifact, ScoreMatrixArtifact, ScoreShape
from gradstore.store.features import FeatureStore
from gradstore.store.read_ahead import read_ahead


def write_matrices(
    store: FeatureStore, contributions: StoredContributions, methods: Sequence[Method], progress: Progress
) -> None:
    r"""Write the blocks that are missing of the scores under every weighting; C is read once for all.

    .. math:: S[q, n] = \sum_j w_j C[q, n, j]

    They are what ``contribute.mode = "scores"`` makes, but for the rounding of C as it is stored: NaN in rows that are not valid,
    and linear where scores are squared in the end.

    Raises
    ------
    ContractError
        If matrices of these names were made otherwise.
    """
    artifacts = {method: _create(store, contributions.artifact, method) for method in methods}
    missing = {method: set(artifact.missing_units()) for method, artifact in artifacts.items()}
    blocks = sorted({block for units in missing.values() for block in units})
    if not blocks:
        return
    made = contributions.artifact
    weights_MV = np.stack([read_weights(store, method.weights) for method in methods], 1)
    rows = [stop - start for start, stop in map(made.shape.block_range, range(made.shape.num_blocks))]
    left = sum(rows[block] for block in blocks)
    with progress.stage("score matrices", sum(rows), "rows", sum(rows) - left) as advance:
        s_QNV = np.empty((made.shape.queries, made.shape.block_rows, len(methods)), np.float32)
        for block, first, c_QNM in _read(contributions, blocks):
            queries, size, _ = c_QNM.shape
            s_QNV[first : first + queries, :size] = c_QNM @ weights_MV
            if first + queries < made.shape.queries:
                continue
            for place, (method, artifact) in enumerate(artifacts.items()):
                if block in missing[method]:
                    artifact.write_block(block, np.ascontiguousarray(s_QNV[:, :size, place]), facts={"rows": size})
            advance(size)


def _create(store: FeatureStore, made: ContributionArtifact, method: Method) -> ScoreMatrixArtifact:
    """Create the artifact as `contribute` does where it makes scores alone."""
    of_c = {key: value for key, value in made.settings.items() if key != "shape"}
    weights = None
    if method.weights is not None:
        weights = {"name": method.weights, "made": dict(open_weights(store, method.weights).settings)}
    shape = ScoreShape(
        queries=made.shape.queries, rows=made.shape.rows, gaps=made.shape.gaps, block_rows=made.shape.block_rows
    )
    return ScoreMatrixArtifact.create(
        store.storage, method.artifact, "eval", settings={**of_c, "weights": weights}, shape=shape
    )


def _read(contributions: StoredContributions, blocks: Sequence[int]) -> Iterator[tuple[int, int, np.ndarray]]:
    """(Block, first query, C [q, n, M]): all queries of a block, some at a time, before those of the next."""
    shape, read = contributions.shape, contributions.artifact.read
    slices = contributions.slices(0, shape.queries)
    steps = [(block, *queries) for block in blocks for queries in slices]

    def begin(
        pool: ThreadPoolExecutor, step: tuple[int, int, int], buffer: np.ndarray
    ) -> Callable[[], tuple[int, int, np.ndarray]]:
        block, first, last = step
        reading = pool.submit(read, first, last, block, buffer)
        return lambda: (block, first, reading.result())

    most = max(last - first for first, last in slices)
    buffers = [aligned((most, shape.block_rows, len(shape.groups))) for _ in range(LEARNER_BUFFERS)]
    return read_ahead(steps, buffers, begin, threads=1)
