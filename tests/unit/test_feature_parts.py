"""What a feature set says of the matrices that its features are, or are factors of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gradstore.errors import ContractError
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureArray, FeaturePart, FeatureStore, SetInfo
from tests import stores

MATRICES = (
    FeaturePart(part="layer.weight[0:8,0:8]", start=0, shape=(2, 3)),
    FeaturePart(part="layer.bias[0:8,0:1]", start=6, shape=(2, 1)),
)
FACTORS = (FeaturePart(part="layer.weight[0:8,0:8]", start=0, shape=(3, 4), factors=2),)


def info(*parts: FeaturePart) -> SetInfo:
    width = sum(part.features for part in parts) or 5
    array = FeatureArray(name="layer", features=width, scale=1.0, depth=None, function="layer", parts=parts)
    return replace(stores.set_info(), arrays=(array,))


def test_a_matrix_has_its_entries_as_features_and_factors_have_theirs() -> None:
    assert [part.features for part in MATRICES] == [6, 2]
    assert [part.features for part in FACTORS] == [2 * (3 + 4)]


@pytest.mark.parametrize("parts", [MATRICES, FACTORS, ()])
def test_parts_are_read_back_and_stand_among_the_attributes_of_the_array(
    tmp_path: Path, parts: tuple[FeaturePart, ...]
) -> None:
    stores.create(str(tmp_path), info(*parts))

    assert FeatureStore.open(str(tmp_path)).open_set("train").info.arrays[0].parts == parts
    metadata = json.loads(open_storage(str(tmp_path)).read("features/train/m0/layer/zarr.json"))
    assert metadata["attributes"].get("parts", []) == [
        {"part": part.part, "start": part.start, "shape": list(part.shape), "factors": part.factors} for part in parts
    ]


def test_a_set_whose_features_are_other_matrices_is_refused(tmp_path: Path) -> None:
    stores.create(str(tmp_path), info(*MATRICES))
    turned = (replace(MATRICES[0], shape=(3, 2)), MATRICES[1])

    with pytest.raises(ContractError, match=r"arrays\.layer\.parts.*: store has .*\[2, 3\].*asks for .*\[3, 2\]"):
        stores.create(str(tmp_path), info(*turned))
