"""The matrices of a projection that come from data, as an artifact."""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest

from gradstore.errors import ContractError, NotReadyError
from gradstore.store.artifacts import MatricesArtifact, list_artifacts
from gradstore.store.backend import Storage, open_storage

_NAMES = count()
SHAPES = {
    "layers.0.up.weight[0:6,0:5]": ((2, 6), (2, 5)),
    "layers.1.up.weight[0:6,0:5]": ((2, 6), (2, 5)),
    "head.weight[0:3,0:6]": ((2, 3), (2, 6)),
}
BUNDLES = ([*SHAPES][:2], [*SHAPES][2:])


@pytest.fixture
def storage() -> Storage:
    return open_storage(f"memory://matrices-{next(_NAMES)}")


def make(storage: Storage, **settings: Any) -> MatricesArtifact:
    return MatricesArtifact.create(
        storage, "components", settings={"examples": "abc", **settings}, shapes=SHAPES, bundles=BUNDLES
    )


def matrices(part: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(len(part))
    first, second = (rng.standard_normal(shape, dtype=np.float32) for shape in SHAPES[part])
    return first, second


def write(artifact: MatricesArtifact, bundle: int) -> None:
    artifact.write_bundle(bundle, {part: matrices(part) for part in artifact.bundles[bundle]}, facts={})


def test_matrices_read_back_when_every_bundle_is_committed(storage: Storage) -> None:
    made = make(storage)
    write(made, 1)
    with pytest.raises(
        NotReadyError, match=r"projections/components: part 0 of 2 is not committed. Run `gradstore feat"
    ):
        made.read_all()
    write(made, 0)

    found = MatricesArtifact.open(storage, "components").read_all()

    assert list(found) == list(SHAPES)
    for part, pair in found.items():
        for values, expected in zip(pair, matrices(part), strict=True):
            np.testing.assert_array_equal(values, expected)


def test_a_committed_bundle_is_not_written_again(storage: Storage) -> None:
    made = make(storage)
    write(made, 1)
    before = {info.path for info in storage.list_objects("")}

    again = make(storage)
    zeros = {part: (0 * matrices(part)[0], 0 * matrices(part)[1]) for part in BUNDLES[1]}
    again.write_bundle(1, zeros, facts={})

    assert {info.path for info in storage.list_objects("")} == before
    assert again.missing_units() == [0]
    assert [(item.kind, item.name, item.committed, item.total) for item in list_artifacts(storage)] == [
        ("projection", "components", 1, 2)
    ]


def test_matrices_of_other_examples_are_refused_with_a_way_out(storage: Storage) -> None:
    make(storage)

    with pytest.raises(ContractError) as caught:
        make(storage, examples="xyz")

    assert "examples: store has 'abc', the run asks for 'xyz'" in str(caught.value)
    assert f"`gradstore prune {storage.url} projections/components`: `gradstore featurize` then makes it anew" in str(
        caught.value
    )


def test_there_are_none_where_none_were_made(storage: Storage) -> None:
    with pytest.raises(
        NotReadyError, match=r"projections/components: there is no such artifact. Run `gradstore featurize`"
    ):
        MatricesArtifact.open(storage, "components")
