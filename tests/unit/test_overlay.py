"""A storage laid over another: the suite of every storage, and what is below stays as it is."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from gradstore.errors import SpecError
from gradstore.store.backend import Storage, open_storage
from gradstore.store.backend.overlay import OverlayStorage, overlay_url
from tests.storages import Places, StorageSuite

_NAMES = count()


class TestOverlay(StorageSuite):
    @pytest.fixture
    def new_url(self) -> Places:
        return lambda: overlay_url(f"suite-{next(_NAMES)}", f"memory://below-{next(_NAMES)}")


@pytest.fixture
def base(tmp_path: Path) -> Storage:
    storage = open_storage(str(tmp_path / "store"))
    for path in ("a/1", "a/2", "b/3"):
        storage.publish(path, [path.encode()])
    return storage


@pytest.fixture
def laid_over(base: Storage) -> OverlayStorage:
    storage = open_storage(overlay_url(f"over-{next(_NAMES)}", base.url))
    assert isinstance(storage, OverlayStorage)
    return storage


def test_what_is_below_is_read_and_listed_beside_what_was_written(laid_over: OverlayStorage) -> None:
    assert laid_over.publish("a/4", [b"new"])
    assert laid_over.publish("c/5", [b"newer"])
    assert laid_over.read("a/1") == b"a/1"
    assert laid_over.read("c/5") == b"newer"
    assert {info.path for info in laid_over.list_objects("a")} == {"a/1", "a/2", "a/4"}
    assert laid_over.list_folders("") == ["a", "b", "c"]


def test_nothing_that_is_written_replaced_or_deleted_reaches_what_is_below(
    base: Storage, laid_over: OverlayStorage
) -> None:
    assert not laid_over.publish("a/1", [b"other"])
    laid_over.replace("a/1", [b"other"])
    laid_over.delete("a/2")
    laid_over.publish("a/4", [b"new"])

    assert laid_over.read("a/1") == b"other"
    assert {info.path: info.bytes for info in laid_over.list_objects("a")} == {"a/1": 5, "a/4": 3}
    assert laid_over.publish("a/2", [b"again"])
    assert laid_over.read("a/2") == b"again"
    assert {info.path: base.read(info.path) for info in base.list_objects("")} == {
        path: path.encode() for path in ("a/1", "a/2", "b/3")
    }


def test_what_is_dropped_was_never_written(laid_over: OverlayStorage) -> None:
    laid_over.publish("c/5", [b"new"])
    laid_over.publish("c/d/6", [b"new"])
    laid_over.replace("a/1", [b"other"])

    laid_over.drop("c")

    assert [*laid_over.list_objects("c")] == []
    assert laid_over.read("a/1") == b"other"
    assert laid_over.publish("c/5", [b"once more"])


def test_layers_of_two_names_know_nothing_of_each_other(base: Storage, laid_over: OverlayStorage) -> None:
    other = open_storage(overlay_url(f"over-{next(_NAMES)}", base.url))
    laid_over.publish("c", [b"ours"])
    assert [info.path for info in other.list_objects("")] == [info.path for info in base.list_objects("")]


def test_a_layer_that_this_process_did_not_make_is_no_store() -> None:
    with pytest.raises(SpecError, match="accepted: a directory, file:///path, s3://bucket/prefix"):
        open_storage("overlay://mine/memory://below")
