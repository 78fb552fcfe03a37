"""Several members in one feature set, and rows that are not valid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gradstore.errors import NotReadyError, SpecError
from gradstore.store.features import FeatureStore
from tests import stores


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "store")


def test_every_member_has_features_records_and_tables_of_its_own(url: str) -> None:
    info = replace(stores.set_info(), members=("first", "second"))
    first = stores.create(url, info)
    stores.write(first, 0)
    stores.write(first.of_member("second"), 1)

    opened = FeatureStore.open(url)

    assert opened.open_set("train").member == "first"
    assert opened.open_set("train").missing_blocks() == [1, 2]
    assert opened.open_set("train", "second").missing_blocks() == [0, 2]
    for name, array in opened.open_set("train", "second").read_block(1).items():
        np.testing.assert_array_equal(array, stores.features(info, 1)[name])
    with pytest.raises(NotReadyError, match=r"has no member third; found: first, second"):
        opened.open_set("train", "third")


@pytest.mark.parametrize("name", ["blocks", "scales"])
def test_a_member_that_is_called_like_a_folder_of_the_set_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=f"members: found '{name}', which is another folder's name"):
        replace(stores.set_info(), members=(name,))


def test_the_rows_that_are_not_valid_are_known_without_reading_the_features(url: str) -> None:
    made = stores.create(url, stores.set_info())
    stores.write(made, 0)
    features = stores.features(made.info, 1)
    next(iter(features.values()))[2] = np.nan
    tables = {"examples": stores.examples(made.info, 1), "statistics": stores.statistics(made.info, 1)}
    made.write_block(1, features, **tables, facts={})

    assert FeatureStore.open(url).open_set("train").invalid_blocks() == [1]
