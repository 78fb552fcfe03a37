"""Storms of kill -9: writers of one store die at random moments, a fresh process resumes, and nothing may be wrong.

A storm counts if its kills hit: every writer was at work when it was killed, and after the last kill some blocks were
committed and some were not; as the first kill comes after the first commit, that was so at each of them.
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from gradstore.store.backend import Storage, open_storage
from gradstore.store.blocks import in_parallel
from tests import stores
from tests.faults.contents import attempts, damage, essence, records, undisturbed, unit_of
from tests.faults.processes import Writer, resume

# 12 groups x 102 KB, so that most kills land inside a block.
INFO = stores.set_info(rows=8 * 16, block_rows=16, groups={f"layers.{layer}.mlp": 1600 for layer in range(12)})
_MOST_TRIES = 20


@dataclass(kw_only=True)
class Tally:
    """What storms found: kills that hit, storms that cut a block in two, and blocks that came to harm."""

    kills: int = 0
    cut: int = 0
    missed: int = 0
    bad: int = 0
    lost: int = 0
    doubled: int = 0

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.cut} storms with a block cut in two, {self.missed} that missed; "
            f"blocks: {self.bad} bad, {self.lost} lost, {self.doubled} doubly committed"
        )


@dataclass(kw_only=True)
class Place:
    """Where storms happen.

    Attributes
    ----------
    new_url
        Gives the URL of an empty place.
    env
        What the processes of writers need beside this one's environment.
    seconds
        For each number of writers, how long they take from the first commit to the last when nothing happens to them.
    """

    new_url: Callable[[], str]
    env: Mapping[str, str] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)


def blow(place: Place, rng: random.Random, tally: Tally, *, writers: int, one_order: bool) -> None:
    """Kill ``writers`` writers of one new store, until it hits; then resume, check, and add to the tally.

    With ``one_order`` all write the blocks in the same order, and so race for every one of them.
    """
    if writers not in place.seconds:
        place.seconds[writers] = _seconds_undisturbed(place, writers)
    for _ in range(_MOST_TRIES):
        url = place.new_url()
        stores.create(url, INFO)
        storage = open_storage(url)
        told = _kill(url, place, _orders(rng, writers, one_order), rng)
        before = records(storage, INFO)
        if told is None or not 0 < len(before) < INFO.num_blocks:
            tally.missed += 1
            # Measured when the machine was busier than now.
            place.seconds[writers] *= 0.8
            _clear(storage)
            continue
        tally.kills += writers
        tally.cut += _is_cut(storage, before)
        told.append(resume(url, place.env))
        _judge(storage, before, told, tally)
        _clear(storage)
        return
    raise AssertionError(f"no storm of {_MOST_TRIES} hit")


def oversleep(place: Place, rng: random.Random) -> None:
    """Stop a writer of a new store at a random moment, let another write the rest, and wake it: it must change nothing."""
    if 1 not in place.seconds:
        place.seconds[1] = _seconds_undisturbed(place, 1)
    for _ in range(_MOST_TRIES):
        url = place.new_url()
        stores.create(url, INFO)
        storage, heard = open_storage(url), queue.Queue[int]()
        with Writer(url, "--seed", str(rng.randrange(2**31)), env=place.env, heard=heard) as zombie:
            heard.get(timeout=60)
            time.sleep(rng.uniform(0, place.seconds[1]))
            if not zombie.stop() or not 0 < len(records(storage, INFO)) < INFO.num_blocks:
                place.seconds[1] *= 0.8
                continue
            zombie.wait_until_it_stops()
            resume(url, place.env)
            before = stores.all_objects(storage)
            zombie.go_on()
            assert zombie.wait() == 0, zombie.error
        assert stores.all_objects(storage) == before
        assert zombie.committed.items() <= attempts(records(storage, INFO)).items()
        assert essence(storage) == _undisturbed()
        _clear(storage)
        return
    raise AssertionError(f"none of {_MOST_TRIES} writers was stopped at work")


@cache
def _undisturbed() -> dict[str, bytes]:
    return undisturbed(INFO)


def _orders(rng: random.Random, writers: int, one_order: bool) -> list[int]:
    seeds = [rng.randrange(2**31) for _ in range(writers)]
    return seeds[:1] * writers if one_order else seeds


def _kill(url: str, place: Place, orders: Sequence[int], rng: random.Random) -> list[dict[int, str]] | None:
    """Start writers, kill them at random moments, and return what each said; None if one was no longer at work."""
    heard: queue.Queue[int] = queue.Queue()
    started = [Writer(url, "--seed", str(order), env=place.env, heard=heard) for order in orders]
    heard.get(timeout=60)
    first = time.monotonic()
    hit = True
    for writer, delay in zip(started, sorted(rng.uniform(0, place.seconds[len(orders)]) for _ in orders), strict=True):
        time.sleep(max(0.0, first + delay - time.monotonic()))
        hit &= writer.kill()
    return [writer.committed for writer in started] if hit else None


def _seconds_undisturbed(place: Place, writers: int) -> float:
    url = place.new_url()
    stores.create(url, INFO)
    heard: queue.Queue[int] = queue.Queue()
    started = [Writer(url, "--seed", str(order), env=place.env, heard=heard) for order in range(writers)]
    blocks = {heard.get(timeout=60)}
    first = time.monotonic()
    while len(blocks) < INFO.num_blocks:
        blocks.add(heard.get(timeout=60))
    seconds = time.monotonic() - first
    assert [writer.wait() for writer in started] == [0] * writers
    return seconds


def _is_cut(storage: Storage, before: Mapping[str, bytes]) -> bool:
    """Whether some object belongs to a block without a record."""
    committed = {unit_of(path) for path in before}
    chunks = [info.path.split("/c.") for info in storage.list_objects(f"{INFO.folder}/m0")]
    return any(int(parts[1].partition(".")[0]) not in committed for parts in chunks if len(parts) == 2)


def _judge(storage: Storage, before: Mapping[str, bytes], told: Sequence[Mapping[int, str]], tally: Tally) -> None:
    """Check a resumed store; ``told`` is what each process said was committed, that of the resuming one last."""
    after = records(storage, INFO)
    lost = [path for path in before if after.get(path) != before[path]]
    said = {(block, attempt) for commits in told for block, attempt in commits.items()}
    doubled = len(after) - INFO.num_blocks + len(said - set(attempts(after).items()))
    found, expected = essence(storage), _undisturbed()
    bad = [path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path)]
    bad += damage(storage.url)
    tally.lost += len(lost)
    tally.doubled += doubled
    tally.bad += len(bad)
    assert (bad, lost, doubled) == ([], [], 0), storage.url
    resumed = attempts({path: data for path, data in after.items() if path not in before})
    missing = set(range(INFO.num_blocks)) - attempts(before).keys()
    assert resumed == told[-1], storage.url
    assert resumed.keys() == missing, storage.url
    assert not set(resumed.values()) & set(attempts(before).values()), storage.url


def _clear(storage: Storage) -> None:
    in_parallel(storage.delete, [info.path for info in storage.list_objects("")], threads=storage.concurrency)
