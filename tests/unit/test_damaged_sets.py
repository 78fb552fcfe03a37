"""Feature sets of which objects were deleted or damaged: what the messages say, and that featurize mends it."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from itertools import count

import pytest

from gradstore.errors import IntegrityError, ObjectMissingError
from gradstore.store.codecs import encode_document, encode_table
from gradstore.store.features import FeatureStore
from tests import stores
from tests.storages import Killed, KillingStorage

_NAMES = count()


@pytest.fixture
def url() -> str:
    return f"memory://damaged-sets-{next(_NAMES)}"


@pytest.mark.parametrize("damage", ["missing", "garbage", "other rows", "other writer", "without claim", "dies"])
def test_creating_a_set_again_restores_its_inputs_and_keeps_its_blocks(url: str, damage: str) -> None:
    info = stores.set_info()
    made, path = stores.create(url, info), "features/train/inputs/000001.0.parquet"
    record = stores.write(made, 1)
    storage = made.storage
    storage.delete(path)
    if damage == "garbage":
        storage.publish(path, [b"PAR1 something else"])
    elif damage == "other rows":
        storage.publish(path, encode_table(stores.inputs(info)[0]).parts)
    elif damage == "other writer":
        # As if another pyarrow had written the set: its bytes for the same table are not ours.
        document = json.loads(storage.read("features/train/set.0.json"))
        document["inputs"]["inputs/000001.0.parquet"]["crc32c"] = "00000000"
        del document["crc32c"]
        storage.delete("features/train/set.0.json")
        storage.publish("features/train/set.0.json", encode_document(document).parts)
    elif damage == "without claim":
        storage.delete("features/train/claim.0.json")
    elif damage == "dies":
        with suppress(Killed):
            stores.create(KillingStorage(storage, changes=2), replace(info, block_rows=2))
        # It stays the set that it was, never an older version of it.
        assert FeatureStore.open(url).open_set("train").info == info

    again = stores.create(url, replace(info, block_rows=2))

    for opened in (again, FeatureStore.open(url).open_set("train")):
        assert [opened.read_inputs(block) for block in range(3)] == stores.inputs(info)
    assert again.info == info
    assert again.log.latest(1) == record


def test_creating_a_set_again_restores_deleted_metadata_as_it_was(url: str) -> None:
    made = stores.create(url, stores.set_info())
    before = stores.all_objects(made.storage)
    deleted = ["zarr.json", "features/train/zarr.json", "features/train/m0/layers.0.mlp/zarr.json"]
    for path in deleted:
        made.storage.delete(path)
    stores.create(url, stores.set_info(block_rows=2))
    assert stores.all_objects(made.storage) == before


def test_a_damaged_set_document_is_made_anew_when_it_is_deleted_as_the_message_says(url: str) -> None:
    info = stores.set_info()
    made = stores.create(url, info)
    stores.write(made, 0)
    before, path = stores.all_objects(made.storage), "features/train/set.0.json"
    made.storage.delete(path)
    made.storage.publish(path, [before[path].replace(b"hash", b"has\xff")])
    with pytest.raises(IntegrityError) as caught:
        FeatureStore.open(url).open_set("train")
    assert str(caught.value) == (
        f"{url}/{path}: is not a gradstore document: invalid start byte. Delete it, then run `gradstore featurize` "
        "again: it makes it anew and keeps the blocks."
    )
    made.storage.delete(path)
    stores.create(url, replace(info, block_rows=2))
    assert stores.all_objects(made.storage) == before


def test_a_damaged_chunk_is_named_with_the_commands_that_make_it_anew(url: str) -> None:
    made = stores.create(url, stores.set_info())
    stores.write(made, 1)
    for path in ("m0/layers.0.mlp/c.1.0", "examples/m0/000001.parquet"):
        made.storage.delete(f"features/train/{path}")
    said = rf"Run `gradstore repair {url}`, then `gradstore featurize` again"
    with pytest.raises(ObjectMissingError, match=rf"layers\.0\.mlp/c.1.0: is missing.*{said}"):
        made.read_block(1)
    with pytest.raises(ObjectMissingError, match=rf"examples/m0/000001\.parquet: is missing.*{said}"):
        made.read_examples()
