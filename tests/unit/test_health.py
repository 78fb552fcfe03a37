"""verify: each kind of damage is found by the mode that can, with its object named, and a sound store is sound."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from gradstore.errors import NotReadyError, StorageError
from gradstore.store.backend import ObjectInfo, Storage, open_storage
from gradstore.store.backend.memory import MemoryStorage
from gradstore.store.features import FeatureStore, erase_rows
from tests import stores
from tests.health import change, check, cut, fixture_in_memory, flip, problems, swap, written_store
from tests.storages import Killed, KillingStorage

_NAMES = count()

TRAIN = "features/train"
GROUP = f"{TRAIN}/m0/model.layers.0.mlp.up_proj"
CHUNK = f"{GROUP}/c.1.0"
TABLE = f"{TRAIN}/examples/m0/000001.parquet"
RECORD = f"{TRAIN}/blocks/m0/000001.0.json"
KERNEL = "kernels/block/m0"
C = "contributions/block/eval"
SCALES = "features/learn-int8/scales/m0/c.0.0"
COMPRESSED = "features/learn/m0/model.layers.0.mlp.up_proj/c.0.0"
INPUTS = f"{TRAIN}/inputs/000001.1.parquet"

Damage = Callable[[Storage], object]


def rewrite_metadata(storage: Storage) -> None:
    document = json.loads(storage.read(f"{GROUP}/zarr.json"))
    document["attributes"]["scale_factor"] = 3.0
    change(storage, f"{GROUP}/zarr.json", json.dumps(document).encode())


SEEN_BY_ALL: list[tuple[str, Damage, set[tuple[str, str]]]] = [
    ("deleted chunk", lambda s: s.delete(CHUNK), {("missing object", CHUNK)}),
    ("deleted table", lambda s: s.delete(TABLE), {("missing object", TABLE)}),
    ("truncated chunk", lambda s: cut(s, CHUNK), {("wrong size", CHUNK)}),
    ("flipped record", lambda s: flip(s, RECORD), {("damaged record", RECORD)}),
    (
        "stale record",
        lambda s: change(s, RECORD, s.read(f"{TRAIN}/blocks/m0/000000.0.json")),
        {("record of another unit", RECORD)},
    ),
    (
        "lost generation",
        lambda s: s.delete(f"{TRAIN}/blocks/m0/000000.1.json"),
        {("missing record", f"{TRAIN}/blocks/m0/000000.1.json")},
    ),
    ("flipped store document", lambda s: flip(s, "gradstore.json"), {("damaged document", "gradstore.json")}),
    ("deleted store document", lambda s: s.delete("gradstore.json"), {("missing document", "gradstore.json")}),
    ("flipped set", lambda s: flip(s, f"{TRAIN}/set.2.json"), {("damaged document", f"{TRAIN}/set.2.json")}),
    ("flipped claim", lambda s: flip(s, f"{TRAIN}/claim.1.json"), {("damaged document", f"{TRAIN}/claim.1.json")}),
    ("lost version", lambda s: s.delete(f"{TRAIN}/set.1.json"), {("missing document", f"{TRAIN}/set.1.json")}),
    (
        "set of another name",
        lambda s: s.publish("features/other/set.0.json", [s.read("features/eval/set.0.json")]),
        {("damaged document", "features/other/set.0.json")},
    ),
    (
        "stale version",
        lambda s: change(s, f"{TRAIN}/set.2.json", s.read(f"{TRAIN}/set.1.json")),
        {("damaged document", f"{TRAIN}/set.2.json")},
    ),
    ("lost artifact", lambda s: s.delete(f"{C}/artifact.json"), {("missing document", f"{C}/artifact.json")}),
    ("flipped artifact", lambda s: flip(s, f"{C}/artifact.json"), {("damaged document", f"{C}/artifact.json")}),
    ("deleted inputs", lambda s: s.delete(INPUTS), {("missing inputs", INPUTS)}),
    ("truncated inputs", lambda s: cut(s, INPUTS), {("damaged inputs", INPUTS)}),
    ("deleted metadata", lambda s: s.delete(f"{GROUP}/zarr.json"), {("missing metadata", f"{GROUP}/zarr.json")}),
    ("deleted root metadata", lambda s: s.delete("zarr.json"), {("missing metadata", "zarr.json")}),
    ("wrong metadata", rewrite_metadata, {("wrong metadata", f"{GROUP}/zarr.json")}),
    ("deleted scale", lambda s: s.delete(f"{C}/values/scale/c.0"), {("missing metadata", f"{C}/values/scale/c.0")}),
    ("flipped scale", lambda s: flip(s, f"{C}/values/scale/c.0"), {("wrong metadata", f"{C}/values/scale/c.0")}),
    ("deleted scales", lambda s: s.delete(SCALES), {("missing object", SCALES)}),
    ("deleted block of C", lambda s: s.delete(f"{C}/values/c/c.0.1.0"), {("missing object", f"{C}/values/c/c.0.1.0")}),
]
SEEN_BY_FULL: list[tuple[str, Damage, set[tuple[str, str]]]] = [
    ("flipped chunk", lambda s: flip(s, CHUNK), {("wrong bytes", CHUNK)}),
    ("flipped checksum", lambda s: flip(s, CHUNK, -1), {("wrong bytes", CHUNK)}),
    ("flipped table", lambda s: flip(s, TABLE), {("wrong bytes", TABLE)}),
    ("flipped compressed chunk", lambda s: flip(s, COMPRESSED), {("wrong bytes", COMPRESSED)}),
    ("flipped scales of rows", lambda s: flip(s, SCALES), {("wrong bytes", SCALES)}),
    ("flipped inputs", lambda s: flip(s, INPUTS), {("damaged inputs", INPUTS)}),
    (
        "swapped chunks",
        lambda s: swap(s, CHUNK, f"{GROUP}/c.0.0"),
        {("wrong bytes", CHUNK), ("wrong bytes", f"{GROUP}/c.0.0")},
    ),
    (
        "flipped spectrum",
        lambda s: flip(s, f"{KERNEL}/eigenvectors/head%2F%CE%BC/c.0.0"),
        {("wrong bytes", f"{KERNEL}/eigenvectors/head%2F%CE%BC/c.0.0")},
    ),
    ("flipped block of C", lambda s: flip(s, f"{C}/values/c/c.1.0.0"), {("wrong bytes", f"{C}/values/c/c.1.0.0")}),
]


@pytest.mark.parametrize("full", [False, True])
def test_a_sound_store_of_everything_that_the_format_has_is_clean(full: bool) -> None:
    health = check(fixture_in_memory(), full=full)
    assert health.problems == ()
    assert health.unknown == ()
    assert [unit.ledger.name for unit in health.units if not unit.is_committed] == ["features/learn/m0"]
    # What the block that was taken back left behind: two chunks and two tables.
    assert sorted(info.path for info in health.loose) == [
        "features/learn/examples/m0/000001.parquet",
        "features/learn/m0/model.layers.0.mlp.up_proj/c.1.0",
        "features/learn/m0/model.layers.1.mlp.down_proj/c.1.0",
        "features/learn/statistics/m0/000001.parquet",
    ]


@pytest.mark.parametrize(("damage", "expected"), [case[1:] for case in SEEN_BY_ALL], ids=[c[0] for c in SEEN_BY_ALL])
def test_damage_that_a_listing_or_a_document_shows_is_found_by_both_modes(
    damage: Damage, expected: set[tuple[str, str]]
) -> None:
    storage = fixture_in_memory()
    damage(storage)
    assert problems(storage) == expected
    assert problems(storage, full=True) == expected


@pytest.mark.parametrize(("damage", "expected"), [case[1:] for case in SEEN_BY_FULL], ids=[c[0] for c in SEEN_BY_FULL])
def test_damage_that_only_the_bytes_show_is_found_when_all_are_read(
    damage: Damage, expected: set[tuple[str, str]]
) -> None:
    storage = fixture_in_memory()
    damage(storage)
    assert problems(storage) == set()
    assert problems(storage, full=True) == expected


def test_a_problem_says_what_was_found_and_what_to_do() -> None:
    storage = fixture_in_memory()
    rewrite_metadata(storage)
    cut(storage, CHUNK)
    metadata, chunk = check(storage).problems
    assert metadata.found.startswith("attribute scale_factor is 3.0 instead of 0.015625")
    assert metadata.remedy == f"Run `gradstore repair {storage.url}`: it writes it again."
    assert chunk.found == "has 49 bytes instead of 52"
    assert chunk.remedy == (
        f"Run `gradstore repair {storage.url}`, then `gradstore featurize`: it makes this part anew."
    )


def test_an_attribute_that_somebody_added_to_metadata_is_no_problem() -> None:
    storage = fixture_in_memory()
    document = json.loads(storage.read(f"{GROUP}/zarr.json"))
    document["attributes"]["seen_by"] = "somebody"
    change(storage, f"{GROUP}/zarr.json", json.dumps(document).encode())
    assert problems(storage) == set()


def test_where_there_is_no_store_there_is_nothing_to_check() -> None:
    storage = open_storage("memory://health-of-nothing")
    storage.publish("somebody's.txt", [b"text"])
    with pytest.raises(NotReadyError, match="memory://health-of-nothing: no store is there"):
        check(storage)


class CountingStorage(MemoryStorage):
    """Counts listings, and remembers what is read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.listings = 0
        self.read_paths: list[str] = []

    def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
        self.listings += 1
        return super().list_objects(folder)

    def read(self, path: str) -> bytes:
        self.read_paths.append(path)
        return super().read(path)


def test_a_quick_check_lists_once_and_reads_documents_alone() -> None:
    storage = CountingStorage(fixture_in_memory().url.removeprefix("memory://"))
    check(storage)
    assert storage.listings == 1
    assert all(path.endswith(".json") or "/scale/" in path for path in storage.read_paths)
    # A record is read once, and of every unit only the newest.
    records = [path for path in storage.read_paths if "/blocks/" in path or "/commits/" in path]
    assert len(records) == len(set(records)) == 15


def test_an_object_that_the_disk_cannot_read_is_named_and_the_others_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = fixture_in_memory()
    flip(storage, COMPRESSED)
    whole = storage.read_into

    def read_into(path: str, buffer: memoryview) -> int:
        if path == CHUNK:
            raise StorageError(f"{path}: Input/output error.") from OSError(errno.EIO, "Input/output error")
        return whole(path, buffer)

    monkeypatch.setattr(storage, "read_into", read_into)
    assert problems(storage, full=True) == {("wrong bytes", CHUNK), ("wrong bytes", COMPRESSED)}


def test_bytes_that_were_damaged_on_their_way_are_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = fixture_in_memory()
    whole = storage.read_into
    damaged: list[str] = []

    def damage_once(path: str, buffer: memoryview) -> int:
        size = whole(path, buffer)
        if not damaged:
            damaged.append(path)
            buffer[0] ^= 1
        return size

    monkeypatch.setattr(storage, "read_into", damage_once)
    assert problems(storage, full=True) == set()
    assert damaged


def test_a_block_that_was_written_anew_since_the_listing_is_no_problem() -> None:
    made = stores.create(f"memory://health-moving-{next(_NAMES)}", stores.set_info())
    stores.write(made, 0)
    storage = made.storage
    listed = [*storage.list_objects("")]
    made.log.take_back(0, "repair")
    storage.delete("features/train/m0/layers.0.mlp/c.0.0")

    class ListingFromBefore(MemoryStorage):
        def list_objects(self, folder: str) -> Iterator[ObjectInfo]:
            return iter(listed)

    assert problems(ListingFromBefore(storage.url.removeprefix("memory://"))) == set()


@pytest.mark.parametrize("changes", range(3))
def test_a_creation_that_was_killed_is_told_until_it_is_finished(changes: int) -> None:
    storage = open_storage(f"memory://health-creation-{next(_NAMES)}")
    with pytest.raises(Killed):
        stores.create(KillingStorage(storage, changes=2 + changes), stores.set_info())
    assert problems(storage) == {("unfinished creation", "features/train/claim.0.json")}
    stores.create(storage, stores.set_info())
    assert problems(storage, full=True) == set()


@pytest.mark.parametrize("changes", range(1, 12))
def test_an_append_that_was_killed_is_told_until_it_is_finished(changes: int) -> None:
    storage = written_store()
    info = FeatureStore.open(storage).open_set("train").info
    extended = info.appended(3, "hash of more", None)
    inputs = stores.inputs(extended)[info.num_blocks :]
    with pytest.raises(Killed):
        FeatureStore.open(KillingStorage(storage, changes=changes)).extend_set("train", extended, inputs)
    for full in (False, True):
        assert problems(storage, full=full) == {("unfinished append", "features/train/claim.1.json")}
    FeatureStore.open(storage).extend_set("train", extended, inputs)
    assert problems(storage, full=True) == set()


def test_an_erasure_that_was_killed_is_told_until_it_is_finished() -> None:
    undisturbed = written_store()
    erase_rows(FeatureStore.open(undisturbed), "train", [1, 5], lambda info, _: stores.statistics(info, 0))
    assert problems(undisturbed, full=True) == set()
    killed = 0
    while True:
        storage = written_store()
        dying = FeatureStore.open(KillingStorage(storage, changes=killed + 1))
        try:
            erase_rows(dying, "train", [1, 5], lambda info, _: stores.statistics(info, 0))
        except Killed:
            killed += 1
        else:
            break
        found = problems(storage, full=True)
        assert {kind for kind, _ in found} == {"unfinished erasure"}, killed
        erase_rows(FeatureStore.open(storage), "train", [1, 5], lambda info, _: stores.statistics(info, 0))
        assert problems(storage, full=True) == set()
    # After the claim: two tables of inputs and the document; of two blocks in two members a record, five objects, a record.
    assert killed == 2 + 1 + 4 * 7


def test_an_erasure_that_died_before_it_removed_what_an_attempt_left_is_told() -> None:
    made = stores.create(f"memory://health-attempt-{next(_NAMES)}", stores.set_info())
    storage = made.storage
    with pytest.raises(Killed):
        stores.write(FeatureStore.open(KillingStorage(storage, changes=2)).open_set("train"), 1)
    # After claim, inputs and document, the first record that takes the block back.
    dying = FeatureStore.open(KillingStorage(storage, changes=3, after=True))
    with pytest.raises(Killed):
        erase_rows(dying, "train", [5], lambda info, _: stores.statistics(info, 0))
    assert len(check(storage).loose) == 2 + 1
    assert {kind for kind, _ in problems(storage)} == {"unfinished erasure"}
    erase_rows(FeatureStore.open(storage), "train", [5], lambda info, _: stores.statistics(info, 0))
    assert check(storage).loose == []
    assert problems(storage) == set()
