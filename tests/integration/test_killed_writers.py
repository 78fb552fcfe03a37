"""Writers that are killed, and writers that wake up too late; the hundred kills are in tests/slow/test_faults.py."""

from __future__ import annotations

import random
from itertools import count
from pathlib import Path

import pytest

from gradstore.errors import SupersededError
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureSet, FeatureStore
from tests import stores
from tests.faults.contents import essence, undisturbed
from tests.faults.processes import Writer
from tests.faults.storm import Place, Tally, blow
from tests.servers import S3Server

pytestmark = pytest.mark.slow

_NAMES = count()
INFO = stores.set_info()
BLOCK = 1
OBJECTS = len(INFO.arrays) + 2
# Before its first object, among its chunks, and before its record.
MOMENTS = [pytest.param(0, marks=pytest.mark.slow), 2, pytest.param(OBJECTS, marks=pytest.mark.slow)]


@pytest.fixture(params=["directory", *(pytest.param(name, marks=pytest.mark.slow) for name in ("obstore", "s3fs"))])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "directory":
        return Place(new_url=lambda: str(tmp_path / f"store-{next(_NAMES)}"))
    seaweed: S3Server = request.getfixturevalue("seaweed")
    for name, value in {**seaweed.env, "GRADSTORE_S3_CLIENT": request.param}.items():
        monkeypatch.setenv(name, value)
    return Place(new_url=lambda: seaweed.url(f"killed-{next(_NAMES)}"))


def test_four_killed_writers_of_the_same_blocks_leave_what_a_fresh_one_makes_whole(tmp_path: Path) -> None:
    place, tally = Place(new_url=lambda: str(tmp_path / f"store-{next(_NAMES)}")), Tally()
    blow(place, random.Random(4), tally, writers=4, one_order=True)
    assert (tally.kills, tally.bad, tally.lost, tally.doubled) == (4, 0, 0, 0)


@pytest.mark.parametrize("written", MOMENTS)
def test_a_writer_that_wakes_after_another_has_committed_changes_nothing(place: Place, written: int) -> None:
    made = stores.create(place.new_url(), INFO)
    with Writer(made.storage.url, *stopping(written), env={}) as zombie:
        zombie.wait_until_it_stops()
        assert BLOCK in made.missing_blocks()
        others = write_in_another_process(made)
        before = stores.all_objects(made.storage)
        zombie.go_on()
        assert zombie.wait() == 0
    assert zombie.committed == others
    assert stores.all_objects(made.storage) == before


@pytest.mark.parametrize("written", MOMENTS)
def test_a_writer_that_wakes_after_a_repair_is_told_and_nothing_wrong_is_visible(place: Place, written: int) -> None:
    made = stores.create(place.new_url(), INFO)
    with Writer(made.storage.url, *stopping(written), env={}) as zombie:
        zombie.wait_until_it_stops()
        write_in_another_process(made)
        made.log.take_back(BLOCK, "repair")
        others = write_in_another_process(made)
        zombie.go_on()
        assert zombie.wait() == SupersededError.exit_code
    assert zombie.error is not None
    assert zombie.error["error"] == "SupersededError"
    assert f"{made.storage.url}/features/train/blocks/m0: unit {BLOCK} was taken back" in zombie.error["message"]
    assert latest_attempt(made) == others[BLOCK]
    require_whole(made)


@pytest.mark.parametrize("written", MOMENTS)
def test_a_writer_that_wakes_after_a_repair_that_nobody_followed_commits_nothing(place: Place, written: int) -> None:
    made = stores.create(place.new_url(), INFO)
    with Writer(made.storage.url, *stopping(written), env={}) as zombie:
        zombie.wait_until_it_stops()
        made.log.take_back(BLOCK, "repair")
        zombie.go_on()
        assert zombie.wait() == SupersededError.exit_code
    assert made.missing_blocks() == [*range(INFO.num_blocks)]
    require_whole(made)


def stopping(written: int) -> tuple[str, ...]:
    return "--blocks", str(BLOCK), "--stop-before", str(written)


def write_in_another_process(made: FeatureSet) -> dict[int, str]:
    """Write the block; return the attempt by block, as the writer says it."""
    with Writer(made.storage.url, "--blocks", str(BLOCK), env={}) as writer:
        assert writer.wait() == 0, writer.error
    assert latest_attempt(made) == writer.committed[BLOCK]
    return writer.committed


def latest_attempt(made: FeatureSet) -> str:
    record = FeatureStore.open(made.storage.url).open_set(INFO.name).log.latest(BLOCK)
    assert record is not None
    return record.attempt


def require_whole(made: FeatureSet) -> None:
    """Write what is missing, and compare all objects but records with those of a store that nothing happened to."""
    opened = FeatureStore.open(made.storage.url).open_set(INFO.name)
    for block in opened.missing_blocks():
        stores.write(opened, block)
    found, expected = essence(open_storage(made.storage.url)), undisturbed(INFO)
    assert {path for path in found if "/blocks/" not in path} == {path for path in expected if "/blocks/" not in path}
    for path, data in expected.items():
        assert "/blocks/" in path or found[path] == data, path
