"""C, A_q, candidate rows and scores of stores in memory, against the oracle."""

from __future__ import annotations

from types import ModuleType
from typing import Any, cast

import numpy as np
import pytest

from gradstore.cluster import Engine
from gradstore.errors import ContractError, NotReadyError
from gradstore.numerics.learner import initial_raw_weights
from gradstore.plan import contribute as cuts
from gradstore.plan import sizes
from gradstore.stages.contribute import artifacts, blocks, contribute
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import MomentsArtifact, QueryArtifact, ScoreMatrixArtifact
from gradstore.store.features import FeatureStore
from tests import contributing, oracle
from tests.contributing import expected_c, make_spec, make_store, run, stored_c
from tests.runs import InThisProcess
from tests.stores import all_objects


@pytest.fixture(scope="module")
def first() -> FeatureStore:
    """A store with C of its queries, as it is cut by default."""
    store = make_store()
    run(make_spec(store))
    return store


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    """Compare, group by group since these differ in size, what is not NaN in both."""
    assert (np.isnan(found) == np.isnan(expected)).all()
    for j in range(expected.shape[2]):
        size = np.nanmax(np.abs(expected[:, :, j]))
        assert np.nanmax(np.abs(found[:, :, j] - expected[:, :, j])) <= tolerance * size


@pytest.mark.parametrize(
    "kernel",
    [
        {"kind": "identity"},
        {"kind": "block", "damping": 0.3, "mode": "relative"},
        {"kind": "block", "damping": 2.0, "mode": "absolute"},
        {"kind": "diagonal", "damping": 0.3, "mode": "relative"},
    ],
    ids=lambda kernel: kernel["kind"],
)
def test_contributions_of_every_kernel_are_the_oracles(kernel: dict[str, Any]) -> None:
    store = make_store(invalid=[3, 22])

    run(make_spec(store, kernel=kernel))

    for name in ("learn", "eval"):
        assert_close(stored_c(store, name, kernel["kind"]), expected_c(store, name, **kernel))


def test_self_contributions_of_queries_are_the_oracles() -> None:
    store = make_store()
    run(make_spec(store))
    train, queries = (contributing.stored_features(store, name) for name in ("train", "eval"))
    preconditioned = {
        group: oracle.precondition(train[group], queries[group], kind="block", damping=0.3, mode="relative")
        for group in train
    }

    found = QueryArtifact.open(store.storage, "block", ("eval", "m0")).read_self()

    np.testing.assert_allclose(found, oracle.self_influence(preconditioned, queries, [*train]), rtol=1e-4)


def test_members_add_up_each_eta_times() -> None:
    store = make_store(members=("x", "y"))
    members = [{"name": "x", "eta": 0.5}, {"name": "y", "eta": -2.0}]

    run(make_spec(store, model={"members": members}))

    expected = 0.5 * expected_c(store, "eval", "x") - 2 * expected_c(store, "eval", "y")
    assert_close(stored_c(store, "eval"), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_features_of_every_dtype_are_taken_as_they_read(dtype: Any) -> None:
    store = make_store(dtype=dtype)

    run(make_spec(store))

    assert_close(stored_c(store, "eval"), expected_c(store, "eval"))


def test_in_half_precision_c_is_the_oracles_to_eleven_bits_of_the_largest_group() -> None:
    store = make_store(invalid=[3])

    run(make_spec(store, contribute={"dtype": "float16"}))

    found, expected = stored_c(store, "eval"), expected_c(store, "eval")
    for query in range(len(expected)):
        size = np.nanmax(np.abs(expected[query]))
        assert np.nanmax(np.abs(found[query] - expected[query])) <= 2**-11 * size
    assert (np.isnan(found) == np.isnan(expected)).all()


@pytest.mark.parametrize(
    ("cut", "workers"),
    [
        ({(blocks, "READ_BYTES"): 1}, 1),
        ({(blocks, "GROUPS_AT_ONCE"): 1, (cuts, "GROUPS_AT_ONCE"): 1}, 1),
        ({(cuts, "_TILE_ROWS"): (2, 2)}, 1),
        ({(cuts, "_TILE_ROWS"): (4, 4), (blocks, "GROUPS_AT_ONCE"): 2, (blocks, "READ_BYTES"): 600}, 7),
        ({(artifacts, "query_passes"): lambda *_: (3, 3), (sizes, "CONTRIBUTION_CHUNK_BYTES"): (100, 100)}, 2),
    ],
    ids=["a group a piece", "a group a portion", "tiles of two rows", "all small", "passes over tiles of a query"],
)
@pytest.mark.parametrize("block_rows", [3, 32])
def test_blocks_tiles_bundles_workers_and_passes_change_nothing_but_rounding(
    first: FeatureStore,
    monkeypatch: pytest.MonkeyPatch,
    cut: dict[tuple[ModuleType, str], Any],
    workers: int,
    block_rows: int,
) -> None:
    for (module, name), value in cut.items():
        monkeypatch.setattr(module, name, value)
    second = make_store(block_rows=block_rows)

    run(make_spec(second, cluster={"workers": workers}))

    for name in ("learn", "eval"):
        assert_close(stored_c(second, name), stored_c(first, name), 1e-5)
    moments = [
        MomentsArtifact.open(store.storage, ("block", "learn")).read_second_moments() for store in (first, second)
    ]
    np.testing.assert_allclose(moments[1], moments[0], rtol=1e-4, atol=1e-6 * np.abs(moments[0]).max())


@pytest.mark.parametrize("mode", ["tensor", "streamed"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_second_moments_and_candidates_are_those_of_c_as_it_is_stored(mode: str, dtype: str) -> None:
    store = make_store(invalid=[3])
    kept = make_store(invalid=[3])
    run(make_spec(store, contribute={"mode": mode, "dtype": dtype}))
    run(make_spec(kept, contribute={"dtype": dtype}))
    c = stored_c(kept, "learn").astype(np.float64)
    valid = [row for row in range(c.shape[1]) if row != 3]

    found = MomentsArtifact.open(store.storage, ("block", "learn"))

    moments = found.read_second_moments()
    weights = np.exp(initial_raw_weights(c.shape[2], seed=0))
    scores = oracle.scores(c, weights / weights.sum())
    for query in range(len(c)):
        expected = sum(np.outer(c[query, row], c[query, row]) for row in valid)
        np.testing.assert_allclose(moments[query], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    for span in range(found.shape.num_spans):
        rows = [
            row for block in found.shape.blocks_of(span) for row in range(block * 8, min(block * 8 + 8, 23)) if row != 3
        ]
        of_span = found.read_span(span)
        for query in range(len(c)):
            best = [rows[place] for place in oracle.top(scores[query, rows], min(len(rows), found.shape.candidates))]
            assert of_span.rows[query].tolist() == best + [-1] * (found.shape.candidates - len(best))
            # Without C other queries are built beside these, which may round otherwise.
            tolerance = 0 if mode == "tensor" else 1e-3 if dtype == "float16" else 1e-6
            np.testing.assert_allclose(of_span.candidates[query, : len(best)], c[query, best], tolerance, tolerance)
            assert np.isnan(of_span.candidates[query, len(best) :]).all()
    if mode == "streamed":
        assert store.storage.list_folders("contributions") == []


def test_without_second_moments_there_are_none() -> None:
    store = make_store()

    run(make_spec(store, contribute={"second_moments": False}))

    assert store.storage.list_folders("moments") == []
    assert_close(stored_c(store, "learn"), expected_c(store, "learn"))


def test_scores_are_those_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "READ_BYTES", 300)
    store = make_store(invalid=[3], members=("x", "y"))
    members = {"members": [{"name": "x", "eta": 0.5}, {"name": "y", "eta": -2.0}]}
    run(make_spec(store, model=members))
    c = stored_c(store, "eval")
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    contributing.give_weights(store, dict(zip([*contributing.GROUPS][::-1], weights[::-1], strict=True)))

    run(make_spec(store, model=members, contribute={"mode": "scores", "weights": "given"}))

    for name, weight in {"block.unweighted": np.full(4, 0.25), "block.given": weights}.items():
        matrix = ScoreMatrixArtifact.open(store.storage, name, "eval")
        found = np.concatenate([matrix.read(block) for block in range(matrix.shape.num_blocks)], axis=1)
        expected = oracle.scores(c, weight)
        assert np.nanmax(np.abs(found - expected)) <= 1e-5 * np.nanmax(np.abs(expected))
        assert (np.isnan(found) == np.isnan(expected)).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, r"weights/given: there is no such artifact\. Run `gradstore learn` first"),
        ({}, r"weights/given: not learned to the end\. Run `gradstore learn` again"),
        ({"a": 0.5, "b": 0.5}, r"weights/given: its groups are not those of features/train: c is in one of them only"),
    ],
    ids=["missing", "not learned to the end", "of other groups"],
)
@pytest.mark.parametrize("kernel", ["block", "full"])
def test_weights_that_scores_cannot_be_made_under_leave_the_store_as_it_is(
    kernel: str, given: dict[str, float] | None, message: str
) -> None:
    store = make_store()
    # Norms are made before any query: they are not to be there either.
    asked = {"mode": "scores", "weights": "given", "normalize": "cosine"}
    spec = make_spec(store, kernel={**contributing.KERNEL, "kind": kernel}, contribute=asked)
    engine, quiet = cast(Engine, InThisProcess()), Progress(quiet=True)
    build_kernel(spec, engine, quiet)
    if given is not None:
        contributing.give_weights(store, given)
    before = all_objects(store.storage)

    with pytest.raises((NotReadyError, ContractError), match=message):
        contribute(spec, engine, quiet)

    assert all_objects(store.storage) == before
