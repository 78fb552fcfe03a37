"""A hundred kills of writers, on a disk and on S3: no block is bad, lost or committed twice."""

from __future__ import annotations

import random
import time
from itertools import count
from pathlib import Path

import pytest

from tests.faults.storm import Place, Tally, blow, oversleep
from tests.servers import S3Server

pytestmark = pytest.mark.slow

_NAMES = count()


# Storms of one writer and of four: a hundred kills in all.
STORMS = {"directory": (30, 8), "obstore": (14, 4), "s3fs": (4, 1)}
STOPS = 3


@pytest.fixture(params=STORMS)
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(where: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    if where == "directory":
        return Place(new_url=lambda: str(tmp_path / f"store-{next(_NAMES)}"))
    seaweed: S3Server = request.getfixturevalue("seaweed")
    for name, value in {**seaweed.env, "GRADSTORE_S3_CLIENT": where}.items():
        monkeypatch.setenv(name, value)
    return Place(new_url=lambda: seaweed.url(f"storm-{next(_NAMES)}"))


def test_kills_leave_no_block_bad_or_lost_or_committed_twice(
    place: Place, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, four = STORMS[where]
    rng, tally, began = random.Random(f"storms on {where}"), Tally(), time.monotonic()
    for writers in [1] * alone + [4] * four:
        blow(place, rng, tally, writers=writers, one_order=rng.random() < 0.5)
    with capsys.disabled():
        print(f"\n{where}: {tally}; {time.monotonic() - began:.0f} s")
    assert tally.kills == alone + 4 * four
    assert (tally.bad, tally.lost, tally.doubled) == (0, 0, 0)
    assert tally.cut > 0


def test_writers_that_are_stopped_anywhere_and_wake_when_all_is_written_change_nothing(
    place: Place, where: str
) -> None:
    rng = random.Random(f"sleepers on {where}")
    for _ in range(STOPS):
        oversleep(place, rng)
