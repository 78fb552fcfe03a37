"""Queries that a store answers: scores against the oracle and against C, the layers, what is refused, and a store left alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

import gradstore
from gradstore.cluster import Engine
from gradstore.errors import ContractError, DataError, IntegrityError, NotReadyError, SpecError
from gradstore.stages.contribute import contribute
from gradstore.stages.delete import Query, delete
from gradstore.stages.kernel import build_kernel
from gradstore.stages.known_kernels import Settings, query_spec
from gradstore.stages.progress import Progress
from gradstore.stages.query import Session, Winner
from gradstore.stages.query.stage import Asked, query
from gradstore.stages.sketches import Sketch
from gradstore.store.artifacts import KernelArtifact
from gradstore.store.features import FeatureStore
from tests import oracle, stores, synthetic
from tests.contributing import give_weights, stored_c
from tests.gradients import RandomStore, random_store
from tests.runs import InThisProcess

ENGINE, QUIET = cast(Engine, InThisProcess()), Progress(quiet=True)
INVALID = (2, 7)
GROUPS = [*stores.GROUPS]
GIVEN = {group: (1.0 + place) / 6 for place, group in enumerate(GROUPS)}
# As many as there are.
ALL = 11


def made_of(made: RandomStore, *runs: Mapping[str, Mapping[str, Any]]) -> RandomStore:
    """The store with the kernels and contributions of some runs, and given weights of the first one's kernel."""
    for tables in runs:
        spec = made.spec(tables)
        for stage in (build_kernel, contribute):
            stage(spec, ENGINE, QUIET)
    give_weights(FeatureStore.open(made.url), GIVEN)
    return made


def erase(made: RandomStore, example: str) -> None:
    delete(made.url, Query(ids=frozenset([example])), [], QUIET, dry_run=False)


@pytest.fixture(scope="module")
def made() -> RandomStore:
    return made_of(random_store(invalid=INVALID), {})


@pytest.fixture
def session(made: RandomStore) -> Iterator[Session]:
    with Session(made.url) as opened:
        yield opened


def scores_of(winners: tuple[Winner, ...]) -> dict[int, float]:
    return {winner.row: winner.score for winner in winners}


def test_scores_are_the_oracles_without_and_with_weights(session: Session, made: RandomStore) -> None:
    answer = session.query(index="eval:1", k=ALL)

    train, queries = made.features("train"), made.features("eval")
    valid = [row for row in range(ALL) if row not in INVALID]
    kept = {group: rows[valid] for group, rows in train.items()}
    preconditioned = {
        group: oracle.precondition(kept[group], queries[group], kind="block", damping=0.1, mode="relative")
        for group in GROUPS
    }
    c = oracle.contributions(preconditioned, kept, GROUPS)
    for name, weights in (("unweighted", np.full(3, 1 / 3)), ("given", np.array([*GIVEN.values()]))):
        expected = oracle.scores(c, weights)[1]
        found = answer.rankings[name]
        order = [valid[place] for place in oracle.top(expected, len(valid))]
        assert [winner.row for winner in found.proponents] == order
        assert [winner.row for winner in found.opponents] == order[::-1]
        np.testing.assert_allclose(
            [scores_of(found.proponents)[row] for row in valid], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max()
        )
        for winner in found.proponents:
            assert winner.score == pytest.approx(sum(winner.parts), rel=1e-5, abs=1e-7)
    assert (answer.query, answer.label, answer.text, answer.kernel) == ("eval:1", "label 1", "eval 1", "block")
    assert found.proponents[0].example_id == f"train-{found.proponents[0].row}"


RUNS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "identity": ({}, {"kernel": {"kind": "identity"}}),
    "diagonal": ({}, {"kernel": {"kind": "diagonal"}}),
    "ekfac": ({}, {"kernel": {"kind": "ekfac"}}),
    "primal": ({}, {"kernel": {"kind": "full", "route": "primal"}}),
    "dual": ({}, {"kernel": {"kind": "full", "route": "dual"}}),
    "low_rank": ({}, {"kernel": {"kind": "full", "route": "low_rank", "rank": 6}}),
    "members": ({"etas": {"a": 0.5, "b": 2.0}}, {"kernel": {"kind": "block"}}),
    "mean": ({"etas": {"a": 0.5, "b": 2.0}}, {"kernel": {"kind": "block", "members": "mean"}}),
    "margin": ({"output": "margin"}, {}),
    "cosine": ({}, {"contribute": {"normalize": "cosine"}}),
    "float16": ({"dtype": "float16"}, {}),
    "int8": ({"dtype": "int8"}, {}),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_stored_query_has_the_scores_that_its_contributions_give(case: str) -> None:
    settings, tables = RUNS[case]
    made = made_of(random_store(invalid=INVALID, **settings), tables)
    (kernel,) = {name.partition("/")[0] for name in FeatureStore.open(made.url).storage.list_folders("contributions")}

    with Session(made.url) as session:
        answer = session.query(index="eval:2", k=ALL)

    c = stored_c(FeatureStore.open(made.url), "eval", kernel)
    expected = oracle.scores(c, np.array([*GIVEN.values()]))[2]
    given = answer.rankings["unweighted"] if kernel != "block" else answer.rankings["given"]
    if kernel != "block":
        expected = oracle.scores(c, np.full(3, 1 / 3))[2]
    found = scores_of(given.proponents)
    assert sorted(found) == [row for row in range(ALL) if row not in INVALID]
    np.testing.assert_allclose(
        [*found.values()], expected[[*found]], rtol=1e-4, atol=1e-5 * float(np.nanmax(np.abs(expected)))
    )


def test_scores_that_are_squared_in_the_end_are_ranked_squared_with_parts_of_what_they_are_squares_of() -> None:
    made = made_of(random_store(output="das"), {"kernel": {"kind": "full"}})

    with Session(made.url) as session:
        found = session.query(index="eval:0", k=3).rankings["unweighted"]

    c = stored_c(FeatureStore.open(made.url), "eval", "full")
    expected = oracle.scores(c, np.full(3, 1 / 3))[0] ** 2
    assert [winner.row for winner in found.proponents] == oracle.top(expected, 3)
    for winner in found.proponents:
        assert winner.score == pytest.approx(expected[winner.row], rel=1e-4)
        assert winner.score == pytest.approx(sum(winner.parts) ** 2, rel=1e-4)


def test_of_several_kernels_one_is_asked_for_and_each_damping_of_a_sweep_is_one() -> None:
    made = made_of(
        random_store(),
        {"kernel": {"kind": "block", "damping": [0.1, 10.0]}},
        {"kernel": {"kind": "identity"}, "contribute": {"normalize": "relatif"}},
    )

    with pytest.raises(SpecError, match=r"--kernel: is missing; .* has: block_0p1, block_10, identity"):
        Session(made.url)
    with pytest.raises(SpecError, match=r"--kernel: found 'none'; .* has: block_0p1, block_10, identity"):
        Session(made.url, kernel="none")
    for kernel in ("block_0p1", "block_10", "identity"):
        with Session(made.url, kernel=kernel) as session:
            found = scores_of(session.query(index="eval:0", k=ALL).rankings["unweighted"].proponents)
        expected = oracle.scores(stored_c(FeatureStore.open(made.url), "eval", kernel), np.full(3, 1 / 3))[0]
        np.testing.assert_allclose([*found.values()], expected[[*found]], rtol=1e-4)


def test_a_store_with_a_kernel_alone_is_asked_by_its_run() -> None:
    made = random_store()
    build_kernel(made.spec(), ENGINE, QUIET)

    with Session(made.url) as session:
        answer = session.query(index="learn:4", k=2)

    assert [*answer.rankings] == ["unweighted"]
    assert len(answer.rankings["unweighted"].proponents) == 2


def test_any_set_can_be_asked_of_and_a_train_example_is_its_own_best_proponent(session: Session) -> None:
    answer = session.query(index="train:5", k=1)
    assert answer.rankings["unweighted"].proponents[0].row == 5


def test_a_train_example_whose_features_are_of_a_step_and_no_gradient_is_no_query() -> None:
    made = made_of(random_store(adam=True), {})
    with Session(made.url) as session, pytest.raises(ContractError, match=r"train:5: .* directions of Adam's steps"):
        session.query(index="train:5")


def test_nothing_of_the_store_changes_and_nothing_is_left_in_memory(tmp_path: Path) -> None:
    made = made_of(random_store(tmp_path, invalid=INVALID), {})
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    with Session(made.url) as session:
        session.query(index="eval:0")
        written = [*session._overlay._written.list_objects("")]

    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before
    # Folders that Zarr readers would look for.
    assert all(info.path.endswith("zarr.json") for info in written)


@pytest.mark.parametrize("memory_bytes", [0, 300, 10**6])
def test_what_is_kept_in_memory_changes_no_answer(made: RandomStore, memory_bytes: int, session: Session) -> None:
    with Session(made.url, memory_bytes=memory_bytes) as other:
        for index in ("eval:0", "eval:1", "eval:0"):
            assert other.query(index=index) == session.query(index=index)


def test_spectra_are_read_once_and_again_where_they_were_made_anew(tmp_path: Path) -> None:
    made = made_of(random_store(tmp_path), {})
    kernel = KernelArtifact.open(FeatureStore.open(made.url).storage, "block", "m0")
    doubled = {group: (2 * values, vectors) for group in GROUPS for values, vectors in [kernel.read(group)]}
    with Session(made.url) as session:
        before = session.query(index="eval:0")
        for chunk in Path(made.url, kernel.folder).rglob("c*"):
            if chunk.is_file():
                chunk.write_bytes(bytes(chunk.stat().st_size))

        assert session.query(index="eval:0") == before
        with Session(made.url, memory_bytes=0) as forgetful, pytest.raises(IntegrityError, match=kernel.folder):
            forgetful.query(index="eval:0")

        for bundle, groups in enumerate(kernel.bundles):
            kernel.log.take_back(bundle, "a test")
            kernel.write_bundle(bundle, {group: doubled[group] for group in groups}, facts={})
        assert session.query(index="eval:0") != before


def test_a_closed_session_holds_no_sketch(made: RandomStore) -> None:
    with Session(made.url) as opened:
        opened._sketch = cast(Sketch, object())
    assert opened._sketch is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(made: RandomStore) -> None:
    with pytest.raises(SpecError, match='--device: found "cuda", and torch finds no CUDA device on this machine'):
        Session(made.url, device="cuda")


def test_weights_that_are_asked_for_are_taken_alone(made: RandomStore) -> None:
    with Session(made.url, weights=[]) as session:
        assert [*session.query(index="eval:0").rankings] == ["unweighted"]
    with Session(made.url, weights=["given", "given"]) as session:
        assert [*session.query(index="eval:0").rankings] == ["unweighted", "given"]
    with pytest.raises(NotReadyError, match="weights/none: there is no such artifact"):
        Session(made.url, weights=["none"])


def test_weights_of_other_groups_are_refused() -> None:
    made = random_store()
    build_kernel(made.spec(), ENGINE, QUIET)
    give_weights(FeatureStore.open(made.url), {"other": 1.0}, "strange")

    with pytest.raises(ContractError, match="weights/strange: its groups are not those of features/train"):
        Session(made.url, weights=["strange"])


@pytest.mark.parametrize(
    ("index", "error", "match"),
    [
        ("12", SpecError, "--index: found '12'; accepted: a set and a row, such as eval:12"),
        ("eval:" + "1" * 5000, SpecError, "--index: found 'eval:1+'; accepted: a set and a row"),
        ("eval:\u0661", SpecError, "accepted: a set and a row, such as eval:12"),
        ("eval:3", SpecError, "--index: found eval:3; eval has rows 0 to 2"),
        ("test:0", NotReadyError, "there is no feature set test; found: eval, learn, train"),
        ("train:2", DataError, "--index: train:2: its features are not finite"),
    ],
)
def test_a_row_that_cannot_be_asked_of_is_refused(
    session: Session, index: str, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match) as raised:
        session.query(index=index)
    assert "overlay" not in str(raised.value)


@pytest.mark.parametrize("k", [0, -1, 12])
def test_a_number_of_winners_that_there_cannot_be_is_refused(session: Session, k: int) -> None:
    with pytest.raises(SpecError, match=f"--k: found {k}; accepted: 1 to 11"):
        session.query(index="eval:0", k=k)


def test_an_erased_row_and_a_stale_kernel_are_refused_by_the_name_of_the_store(tmp_path: Path) -> None:
    made = made_of(random_store(tmp_path), {})
    erase(made, "eval-1")
    with Session(made.url) as session, pytest.raises(DataError, match="--index: eval:1: its example was erased"):
        session.query(index="eval:1")
    erase(made, "train-3")

    with Session(made.url) as session, pytest.raises(ContractError, match=f"{made.url}/kernels/block/m0: is stale"):
        session.query(index="eval:0")


def test_an_erased_train_example_is_no_answer_even_where_its_features_were_kept(tmp_path: Path) -> None:
    # Of the identity there is nothing that could be stale.
    made = made_of(random_store(tmp_path), {"kernel": {"kind": "identity"}})
    with Session(made.url) as session:
        best = session.query(index="eval:0", k=1).rankings["unweighted"].proponents[0]
        erase(made, best.example_id)

        answer = session.query(index="eval:0", k=ALL - 1)

    assert best.row not in scores_of(answer.rankings["unweighted"].proponents)
    assert len(answer.rankings["unweighted"].proponents) == ALL - 1


def test_a_train_set_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    made = made_of(random_store(tmp_path), {})
    block = FeatureStore.open(made.url).open_set("train").log
    block.take_back(1, "a test")

    with Session(made.url) as session, pytest.raises(NotReadyError, match="2 of 3 blocks are committed"):
        session.query(index="eval:0")


def test_self_influence_that_is_missing_is_refused_before_any_query() -> None:
    made = made_of(random_store(), {"contribute": {"normalize": "cosine"}})
    storage = FeatureStore.open(made.url).storage
    for info in [*storage.list_objects("self-influence/block/m0/commits")]:
        storage.delete(info.path)

    with pytest.raises(NotReadyError, match=rf"{made.url}/self-influence/block/m0: is not whole"):
        Session(made.url)


def test_a_text_is_refused_where_the_adapter_reads_none_and_a_stored_row_is_answered(tmp_path: Path) -> None:
    store = synthetic.synthesized(tmp_path / "run")

    with Session(store.storage.url) as session:
        with pytest.raises(SpecError, match=r"of the adapter synthetic, .* Ask by a stored row: --index eval:12"):
            session.query("a text")
        assert len(session.query(index="eval:3", k=5).rankings["unweighted"].proponents) == 5


def test_a_model_that_moved_is_named_for_a_lone_one_alone() -> None:
    made = random_store(etas={"a": 1.0, "b": 2.0})
    members = [{"name": name, "source": f"{name}.pt"} for name in made.etas]
    run = made.spec({"model": {"members": members}}).model_dump()
    store = FeatureStore.create(f"{made.url}-members", contract={"model": {}}, run=run)
    settings = Settings(kernel={"kind": "identity"}, kernel_of="each", normalize="none", etas={"a": 3.0, "b": 4.0})

    spec = query_spec(store, ("identity", settings), model=None, device="cpu")

    assert spec.model.etas == {"a": 3.0, "b": 4.0}
    assert spec.model.of_member("b").source == "b.pt"
    with pytest.raises(
        SpecError, match=r"--model: found new.pt, but the members a, b of the store have models of their own"
    ):
        query_spec(store, ("identity", settings), model="new.pt", device="cpu")


def test_one_of_three_ways_to_ask_is_taken(session: Session) -> None:
    with pytest.raises(SpecError, match="found 0 of text, record and index"):
        session.query()
    with pytest.raises(SpecError, match="found 2 of text, record and index"):
        session.query("a text", index="eval:0")


def test_the_package_has_the_session_and_no_other_name() -> None:
    assert gradstore.Session is Session
    with pytest.raises(AttributeError, match="no attribute 'Sessions'"):
        gradstore.Sessions  # noqa: B018


def test_what_a_command_asks_is_answered_in_order(session: Session) -> None:
    (answer,) = query(session, Asked(index="eval:1"), 2, truncate=False)
    assert answer == session.query(index="eval:1", k=2)
