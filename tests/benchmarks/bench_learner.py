"""Weights of 100 queries x 100,000 rows x 224 groups of C in float16 (4.5 GB), certified, against reading C and streaming it.

learner-setting-reads     wall seconds of one certified setting (k = 100, 10 epochs) to those of as many plain reads of C as it
                          made; beside it how many these were. Target: 1.5, in at most 6 reads.
learner-grid-vs-streamed  seconds of streaming C for every epoch of every setting of a grid (k = 500, ten weight decays) to those
                          of certifying the grid in shared reads. One epoch of one setting is streamed, and counted as often as
                          the grid would take it. Target: 15, in at most 8 reads.

C is half signal, which the groups share to different degrees, and half noise. A_q and the first candidates are made as
contribute makes them, and not timed: they come with C.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.cluster.tasks import one_thread
from gradstore.numerics.learner import (
    Certification,
    CertifiedWeights,
    KeptRows,
    LearnerSettings,
    best_rows,
    initial_weights,
    learn_certified,
    learn_weights,
)
from gradstore.numerics.moments import Candidates, SecondMoments, kept_rows
from gradstore.plan.sizes import learner_tile, query_tile
from gradstore.stages.contributions import Contributions, Reads, StoredContributions
from gradstore.stages.learn.reading import LearnedFrom, TileReader
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import ContributionArtifact, ContributionShape
from gradstore.store.backend import open_storage

QUERIES, ROWS, GROUPS, BLOCK_ROWS = 100, 100_000, 224, 2048
SHAPE = QUERIES, ROWS, GROUPS
EPOCHS = 10
SETTING = 100
GRID = 500
DECAYS = tuple(np.linspace(0, 1.5, 10).tolist())
MOST_READS = {"setting": 6, "grid": 8}
LIMIT_BYTES = 2**30


def rows() -> Iterator[dict[str, Any]]:
    """The rows of bench.json."""
    folder = Path(tempfile.mkdtemp(prefix="gradstore-bench-"))
    try:
        contributions, guesses = _make(folder)
        with one_thread():
            yield from _measured(contributions, guesses)
    finally:
        shutil.rmtree(folder)


class Guesses:
    """A_q, and the candidates of every block for the largest k."""

    def __init__(self) -> None:
        self._moments = SecondMoments(num_queries=QUERIES, num_groups=GROUPS)
        self._choices: list[tuple[np.ndarray, np.ndarray]] = []
        self._weights_M = initial_weights(GROUPS, seed=0)

    @property
    def second_moments_QMM(self) -> np.ndarray:
        """A_q."""
        return self._moments.total_QMM

    def add(self, rows_N: np.ndarray, c_QNM: np.ndarray) -> None:
        """Take in a block."""
        self._moments.add(0, c_QNM)
        kept = min(len(rows_N), kept_rows(GRID))
        candidates = Candidates(num_queries=QUERIES, kept=kept, weights_M=self._weights_M, transform="none")
        candidates.offer(0, c_QNM, rows_N)
        self._choices = [self._best([*self._choices, (candidates.rows_QK, candidates.c_QKM)], kept_rows(GRID))]

    def _best(self, choices: Sequence[tuple[np.ndarray, np.ndarray]], count: int) -> tuple[np.ndarray, np.ndarray]:
        found = best_rows(choices, self._weights_M, count=count, transform="none")
        return (
            np.stack([found.rows(query) for query in range(QUERIES)]),
            np.stack([found.c(query) for query in range(QUERIES)]),
        )

    def kept(self, k: int) -> KeptRows:
        """The first guess for a k."""
        return best_rows(self._choices, self._weights_M, count=kept_rows(k), transform="none")


def _make(folder: Path) -> tuple[Contributions, Guesses]:
    shape = ContributionShape(
        queries=QUERIES,
        rows=ROWS,
        block_rows=BLOCK_ROWS,
        gaps=(),
        groups=tuple(f"layers.{number}" for number in range(GROUPS)),
        query_tile=query_tile(SHAPE, BLOCK_ROWS, "float16"),
        dtype="float16",
    )
    storage = open_storage(str(folder / "store"))
    artifact = ContributionArtifact.create(
        storage, "bench", "learn", settings={"transform": "none"}, shape=shape, scales=np.ones(QUERIES, np.float32)
    )
    draw, guesses = np.random.default_rng(0), Guesses()
    shares_M = draw.random(GROUPS, np.float32)
    for block in range(shape.num_blocks):
        start, stop = shape.block_range(block)
        c_QNM = draw.standard_normal((QUERIES, stop - start, GROUPS), np.float32)
        c_QNM += draw.standard_normal((QUERIES, stop - start, 1), np.float32) * shares_M
        # As it is stored.
        c_QNM = c_QNM.astype(np.float16).astype(np.float32)
        artifact.write_block(block, c_QNM, facts={})
        guesses.add(np.arange(start, stop), c_QNM)
    return StoredContributions(artifact=ContributionArtifact.open(storage, "bench", "learn"), valid={}), guesses


def _measured(contributions: Contributions, guesses: Guesses) -> Iterator[dict[str, Any]]:
    tile = learner_tile(SHAPE)
    one = [LearnerSettings(k=SETTING, epochs=EPOCHS, tile=tile)]
    grid = [LearnerSettings(k=GRID, epochs=EPOCHS, tile=tile, weight_decay=decay) for decay in DECAYS]
    # What is imported at first use is no part of it.
    _certified(contributions, guesses, [LearnerSettings(k=1, epochs=1, tile=tile)])
    a_read = min(
        _seconds(lambda: [None for _ in Reads(contributions, Progress(quiet=True), "bench").read()]) for _ in range(3)
    )

    seconds, setting = _certified(contributions, guesses, one)
    reads = setting.certified[0].certificate.reads
    yield {
        **_row("learner-setting-reads", seconds / (reads * a_read), 1.5, "lower"),
        "peers": {"reads": reads, f"of at most {MOST_READS['setting']}": float(reads <= MOST_READS["setting"])},
        "timed": {"seconds": round(seconds, 2), "a_read": round(a_read, 2)},
    }

    every = LearnedFrom(Reads(contributions, Progress(quiet=True), "bench"), np.arange(QUERIES))
    once = LearnerSettings(k=GRID, epochs=1, tile=tile)
    streamed = _seconds(
        lambda: learn_weights(
            TileReader(every, tile, lambda _: None).read, num_queries=QUERIES, num_groups=GROUPS, settings=once
        )
    )
    seconds, found = _certified(contributions, guesses, grid)
    reads = max(each.certificate.reads for each in found.certified.values())
    kept = max(each.certificate.kept_bytes for each in found.certified.values())
    yield {
        **_row("learner-grid-vs-streamed", EPOCHS * len(DECAYS) * streamed / seconds, 15.0, "higher"),
        "peers": {"reads": reads, f"of at most {MOST_READS['grid']}": float(reads <= MOST_READS["grid"])},
        "timed": {"seconds": round(seconds, 2), "an_epoch_streamed": round(streamed, 2), "kept_bytes": kept},
    }


def _certified(
    contributions: Contributions, guesses: Guesses, settings: Sequence[LearnerSettings]
) -> tuple[float, Certification[CertifiedWeights]]:
    """Seconds, and what was certified: all of it."""
    kept, found = guesses.kept(settings[0].k), list[Certification[CertifiedWeights]]()
    reads = Reads(contributions, Progress(quiet=True), "bench")
    seconds = _seconds(
        lambda: found.append(
            learn_certified(guesses.second_moments_QMM, kept, reads.read, settings=settings, limit_bytes=LIMIT_BYTES)
        )
    )
    assert not found[0].uncertified, found[0].uncertified
    return seconds, found[0]


def _row(name: str, ratio: float, target: float, better: str) -> dict[str, Any]:
    return {"name": name, "ratio": round(ratio, 3), "target": target, "better": better}


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
