"""Kernels, queries, contributions, weights and scores as artifacts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest

from gradstore.errors import ContractError, DataError, IntegrityError, NotReadyError, SpecError
from gradstore.store.artifacts import (
    ContributionArtifact,
    ContributionShape,
    KernelArtifact,
    QueryArtifact,
    QueryShape,
    ScoresArtifact,
    SpectraShape,
    WeightsArtifact,
    list_artifacts,
)
from gradstore.store.backend import Storage, open_storage
from gradstore.store.codecs import encode_document
from tests.storages import Killed, KillingStorage, die

_NAMES = count()
SETTINGS = {"kind": "block", "damping": 0.1, "snapshot": {"blocks": ((0, 0), (1, 0))}}
WIDTHS = {"layers.0": 3, "blocks": 2, "a/b": 4}
BUNDLES = (("layers.0", "blocks"), ("a/b",))


@pytest.fixture
def storage() -> Storage:
    return open_storage(f"memory://artifacts-{next(_NAMES)}")


def spectrum(width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(width)
    matrix = rng.standard_normal((width, width))
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    return values, vectors


def make_kernel(storage: Storage, name: str = "block", **changes: Any) -> KernelArtifact:
    return KernelArtifact.create(
        storage, name, "m0", settings={**SETTINGS, **changes}, shape=SpectraShape(widths=WIDTHS), bundles=BUNDLES
    )


def write_bundle(kernel: KernelArtifact, bundle: int) -> None:
    kernel.write_bundle(bundle, {group: spectrum(WIDTHS[group]) for group in kernel.bundles[bundle]}, facts={})


def make_contributions(
    storage: Storage, dtype: Literal["float32", "float16"] = "float32", **changes: Any
) -> tuple[ContributionArtifact, np.ndarray]:
    shape = ContributionShape(queries=5, rows=7, groups=("a", "b", "c"), block_rows=3, query_tile=2, dtype=dtype)
    scales = (2.0 ** np.arange(-12, -7)).astype(np.float32) if dtype == "float16" else None
    made = ContributionArtifact.create(
        storage, "block", "eval", settings={**SETTINGS, **changes}, shape=shape, scales=scales
    )
    return made, np.random.default_rng(0).standard_normal((5, 7, 3), dtype=np.float32)


def test_spectra_read_back_bundle_by_bundle(storage: Storage) -> None:
    kernel = make_kernel(storage)
    write_bundle(kernel, 0)
    values, vectors = kernel.read("blocks")
    exact_values, exact_vectors = spectrum(2)
    np.testing.assert_array_equal(values, exact_values)
    np.testing.assert_array_equal(vectors, exact_vectors.astype(np.float32))
    assert values.dtype == np.float64
    assert vectors.dtype == np.float32
    with pytest.raises(NotReadyError, match=r"kernels/block/m0: part 1 of 2 is not committed. Run `gradstore kernel`"):
        kernel.read("a/b")
    assert kernel.missing_units() == [1]
    assert not kernel.is_complete()
    write_bundle(kernel, 1)
    assert kernel.is_complete()


def test_a_kernel_without_spectra_is_complete_when_created(storage: Storage) -> None:
    kernel = KernelArtifact.create(
        storage, "identity", "m0", settings={"kind": "identity"}, shape=SpectraShape(widths={}), bundles=()
    )
    assert kernel.is_complete()
    assert KernelArtifact.open(storage, "identity", "m0").settings["kind"] == "identity"


def test_bundles_of_the_first_creation_win(storage: Storage) -> None:
    make_kernel(storage)
    again = KernelArtifact.create(
        storage,
        "block",
        "m0",
        settings=SETTINGS,
        shape=SpectraShape(widths=WIDTHS),
        bundles=[[group] for group in WIDTHS],
    )
    assert again.bundles == [list(bundle) for bundle in BUNDLES]
    assert again.info.num_units == 2


def test_other_settings_are_refused_field_by_field(storage: Storage) -> None:
    make_kernel(storage)
    with pytest.raises(ContractError) as caught:
        make_kernel(storage, damping=0.2)
    assert "kernels/block/m0 was made with other settings" in str(caught.value)
    assert "damping: store has 0.1, the run asks for 0.2" in str(caught.value)
    make_kernel(storage, name="block-2", damping=0.2)


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        ("kernel", "choose another run.store, or run `gradstore prune URL kernels/a/m0`: `gradstore kernel`"),
        (
            "queries",
            "choose another kernel.name (and learn.name), or run `gradstore prune URL queries/a/b/m0`: `gradstore contribute`",
        ),
        (
            "contributions",
            "choose another kernel.name (and learn.name), or run `gradstore prune URL contributions/a/b`: "
            "`gradstore contribute`",
        ),
        ("weights", "choose another learn.name, or run `gradstore prune URL weights/a`: `gradstore learn`"),
        ("scores", "or run `gradstore prune URL scores/a`: `gradstore score`"),
    ],
)
def test_the_way_out_of_other_settings_is_a_key_that_names_the_artifact_or_pruning_it(
    storage: Storage, kind: str, way_out: str
) -> None:
    def create(settings: dict[str, Any]) -> None:
        shape = ContributionShape(queries=2, rows=2, groups=("g",), block_rows=2, query_tile=2)
        creators: dict[str, Callable[[], object]] = {
            "kernel": lambda: KernelArtifact.create(
                storage, "a", "m0", settings=settings, shape=SpectraShape(widths={}), bundles=()
            ),
            "queries": lambda: QueryArtifact.create(
                storage, "a", ("b", "m0"), settings=settings, shape=QueryShape(queries=1, groups=("g",), widths={})
            ),
            "contributions": lambda: ContributionArtifact.create(storage, "a", "b", settings=settings, shape=shape),
            "weights": lambda: WeightsArtifact.create(storage, "a", settings=settings),
            "scores": lambda: ScoresArtifact.create(storage, "a", settings=settings),
        }
        creators[kind]()

    create({"k": 1})
    with pytest.raises(ContractError) as caught:
        create({"k": 2})
    way_out = way_out.replace("URL", storage.url)
    assert str(caught.value).endswith(f"\nRestore these settings, {way_out} then makes it anew.")


def test_a_damaged_object_of_an_artifact_is_named_and_made_anew_once_its_unit_is_taken_back(storage: Storage) -> None:
    kernel = make_kernel(storage)
    write_bundle(kernel, 0)
    chunk = "kernels/block/m0/eigenvectors/blocks/c.0.0"
    storage.delete(chunk)
    storage.publish(chunk, [b"x"])
    with pytest.raises(IntegrityError) as caught:
        KernelArtifact.open(storage, "block", "m0").read("blocks")
    assert f"{storage.url}/{chunk}: its bytes are not those that were committed" in str(caught.value)
    assert f"Run `gradstore repair {storage.url}`, then `gradstore kernel` again" in str(caught.value)

    kernel.log.take_back(0, "repair")
    write_bundle(make_kernel(storage), 0)

    KernelArtifact.open(storage, "block", "m0").read("blocks")


@pytest.mark.parametrize("damage", [b"{", b'{"a": 1, "crc32c": "\xff"}'])
def test_damaged_settings_of_an_artifact_name_the_folder_to_delete_and_the_command(
    storage: Storage, damage: bytes
) -> None:
    ScoresArtifact.create(storage, "block.learned", settings={})
    storage.delete("scores/block.learned/artifact.json")
    storage.publish("scores/block.learned/artifact.json", [damage])
    way_out = rf"Delete the folder {storage.url}/scores/block\.learned, then run `gradstore score` again"
    with pytest.raises(IntegrityError, match=way_out):
        list_artifacts(storage)
    with pytest.raises(IntegrityError, match=way_out):
        ScoresArtifact.create(storage, "block.learned", settings={})


def test_a_damaged_summary_is_named_with_the_commands_that_make_it_anew(storage: Storage) -> None:
    made = ScoresArtifact.create(storage, "a", settings={})
    made.write(pa.table({"query": [0]}), {"chance": 0.5}, facts={})
    storage.delete("scores/a/summary.json")
    storage.publish("scores/a/summary.json", [b"\xff"])
    with pytest.raises(IntegrityError, match=r"scores/a/summary\.json: .* then `gradstore score` again"):
        made.read_summary()


def test_deleted_metadata_and_scales_are_restored_though_the_artifact_is_complete(storage: Storage) -> None:
    made, values = make_contributions(storage, "float16")
    for block in range(3):
        made.write_block(block, values[:, slice(*made.shape.block_range(block))], facts={})
    before = {path: storage.read(f"{made.folder}/{path}") for path in ("values/c/zarr.json", "values/scale/c.0")}
    for path in before:
        storage.delete(f"{made.folder}/{path}")
    make_contributions(storage, "float16")
    assert {path: storage.read(f"{made.folder}/{path}") for path in before} == before


def test_an_artifact_that_is_not_there_says_what_to_run(storage: Storage) -> None:
    with pytest.raises(NotReadyError, match=r"weights/learned: there is no such artifact. Run `gradstore learn` first"):
        WeightsArtifact.open(storage, "learned")


def test_a_name_that_is_no_folder_name_is_refused(storage: Storage) -> None:
    with pytest.raises(SpecError, match=r"name of kernel: found 'a/b'"):
        make_kernel(storage, name="a/b")


def test_queries_read_back(storage: Storage) -> None:
    features = {group: np.random.default_rng(width).random((6, width), np.float32) for group, width in WIDTHS.items()}
    rng = np.random.default_rng(0)
    selves, coefficients = rng.random((6, 3)), rng.random((6, 3, 5), np.float32)
    shape = QueryShape(queries=6, groups=tuple(WIDTHS), widths=WIDTHS, coefficients=5)
    made = QueryArtifact.create(storage, "block", ("eval", "m0"), settings=SETTINGS, shape=shape)
    with pytest.raises(NotReadyError, match="queries/block/eval/m0: part 0 of 1 is not committed"):
        made.read_all()
    made.write(features, selves, coefficients, facts={})
    opened = QueryArtifact.open(storage, "block", ("eval", "m0"))
    found = opened.read_all()
    assert list(found) == list(WIDTHS)
    for group, values in features.items():
        np.testing.assert_array_equal(found[group], values)
    np.testing.assert_array_equal(opened.read_self(), selves)
    np.testing.assert_array_equal(opened.read_coefficients(1, 5), coefficients[1:5])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("queries", [(0, 5), (2, 4), (1, 4), (4, 5)])
def test_contributions_read_back_for_any_queries(
    storage: Storage, dtype: Literal["float32", "float16"], queries: tuple[int, int]
) -> None:
    made, values = make_contributions(storage, dtype)
    for block in range(3):
        start, stop = made.shape.block_range(block)
        made.write_block(block, values[:, start:stop], facts={})
    exact = values
    if dtype == "float16":
        scales = made.scales[:, None, None]
        exact = (values / scales).astype(np.float16).astype(np.float32) * scales
    found = np.concatenate(list(made.read_blocks(*queries)), axis=1)
    np.testing.assert_array_equal(found, exact[slice(*queries)])
    out = np.empty((5, 3, 3), np.float32)
    for block, part in enumerate(ContributionArtifact.open(storage, "block", "eval").read_blocks(*queries, out=out)):
        assert np.shares_memory(part, out)
        np.testing.assert_array_equal(part, exact[slice(*queries), slice(*made.shape.block_range(block))])


def test_an_uncommitted_block_of_contributions_is_not_read(storage: Storage) -> None:
    made, values = make_contributions(storage)
    made.write_block(1, values[:, 3:6], facts={})
    assert made.missing_blocks() == [0, 2]
    with pytest.raises(NotReadyError, match="contributions/block/eval: part 0 of 3 is not committed"):
        made.read(0, 5, 0)


def test_contributions_beyond_float16_are_counted(storage: Storage) -> None:
    made, values = make_contributions(storage, "float16")
    values[0, 0, 0] = 1e6
    values[1, 0, 1] = 1e-30
    record = made.write_block(0, values[:, :3], facts={"seconds": 1})
    assert record.facts == {"seconds": 1, "saturated": 1, "flushed": 1}
    assert made.read(0, 1, 0)[0, 0, 0] == np.float32(65504 * 2.0**-12)


def test_how_contributions_were_divided_first_wins(storage: Storage) -> None:
    make_contributions(storage, "float16")
    again, _ = make_contributions(storage, "float32")
    assert again.shape.dtype == "float16"
    np.testing.assert_array_equal(again.scales, 2.0 ** np.arange(-12, -7))


@pytest.mark.parametrize("changes", range(8))
@pytest.mark.parametrize("dies", [False, True])
def test_creators_at_any_moment_of_each_other_make_one_artifact(storage: Storage, changes: int, dies: bool) -> None:
    def create_otherwise(target: Storage) -> ContributionArtifact:
        shape = ContributionShape(
            queries=5, rows=7, groups=("a", "b", "c"), block_rows=4, query_tile=5, dtype="float16"
        )
        scales = np.full(5, 2.0**7, np.float32)
        return ContributionArtifact.create(target, "block", "eval", settings=SETTINGS, shape=shape, scales=scales)

    event = die if dies else lambda: make_contributions(storage, "float16")
    with suppress(Killed):
        create_otherwise(KillingStorage(storage, changes=changes, event=event))
    make_contributions(storage, "float16")
    made = ContributionArtifact.open(storage, "block", "eval")
    folder = f"{made.folder}/values"
    layout = json.loads(storage.read(f"{folder}/c/zarr.json"))["chunk_grid"]["configuration"]["chunk_shape"]
    assert layout == [made.shape.query_tile, made.shape.block_rows, 3]
    assert storage.read(f"{folder}/scale/c.0")[:-4] == made.scales.tobytes()
    assert "groups" in json.loads(storage.read(f"{folder}/c/zarr.json"))["attributes"]


def test_an_artifact_of_a_newer_format_is_refused(storage: Storage) -> None:
    document = {"format_version": 2, "kind": "weights", "num_units": 1, "settings": {}, "recorded": {}}
    storage.publish("weights/learned/artifact.json", encode_document(document).parts)
    with pytest.raises(ContractError, match="weights/learned has format version 2; this gradstore reads version 1"):
        WeightsArtifact.open(storage, "learned")


def test_an_unfinished_artifact_is_swept_when_it_is_created_again(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    make_kernel(storage)
    abandoned = tmp_path / "kernels/block/m0/.gradstore-dead"
    abandoned.write_bytes(b"")
    os.utime(abandoned, (0, 0))
    make_kernel(storage)
    assert not abandoned.exists()


def test_contributions_of_another_shape_are_refused(storage: Storage) -> None:
    made, values = make_contributions(storage)
    with pytest.raises(DataError, match=r"block 2: found float32 \[5, 3, 3\]; the artifact takes float32 \[5, 1, 3\]"):
        made.write_block(2, values[:, :3], facts={})


def test_a_flipped_bit_in_contributions_is_caught(storage: Storage) -> None:
    made, values = make_contributions(storage)
    made.write_block(0, values[:, :3], facts={})
    path = "contributions/block/eval/values/c/c.1.0.0"
    data = bytearray(storage.read(path))
    data[5] ^= 1
    storage.delete(path)
    storage.publish(path, [bytes(data)])
    with pytest.raises(IntegrityError, match=path):
        made.read(0, 5, 0)
    made.read(0, 2, 0)


def test_weights_and_their_trajectory_read_back(storage: Storage) -> None:
    weights = pa.table({"group": ["a", "b"], "weight": [0.25, 0.75]})
    trajectory = pa.table({"step": [0, 1], "weights": [[0.5, 0.5], [0.25, 0.75]]})
    made = WeightsArtifact.create(storage, "learned", settings={"k": 10, "seed": 0})
    record = made.write(weights, trajectory, facts={"seconds": 2})
    opened = WeightsArtifact.open(storage, "learned")
    assert opened.read().equals(weights)
    assert opened.read_trajectory().equals(trajectory)
    assert opened.settings == {"k": 10, "seed": 0}
    assert made.write(trajectory, weights, facts={}) == record


def test_scores_and_their_summary_read_back(storage: Storage) -> None:
    proponents = pa.table({"query": [0], "rank": [0], "side": ["proponent"], "example": [3], "score": [1.5]})
    summary = {"kernel": "block", "weights": None, "precision_at_10": 0.57, "baselines": {"bm25": 0.6}}
    made = ScoresArtifact.create(storage, "unweighted", settings={})
    with pytest.raises(NotReadyError, match="Run `gradstore score`"):
        made.read()
    made.write(proponents, summary, facts={})
    assert made.read().equals(proponents)
    assert made.read_summary() == summary


def test_the_list_of_artifacts_tells_how_much_of_each_is_committed(storage: Storage) -> None:
    write_bundle(make_kernel(storage), 1)
    made, values = make_contributions(storage)
    made.write_block(0, values[:, :3], facts={})
    WeightsArtifact.create(storage, "learned", settings={"k": 10})
    found = {(status.kind, status.name): (status.committed, status.total) for status in list_artifacts(storage)}
    assert found == {
        ("kernel", "block/m0"): (1, 2),
        ("contributions", "block/eval"): (1, 3),
        ("weights", "learned"): (0, 1),
    }


def test_an_empty_store_has_no_artifacts(storage: Storage) -> None:
    assert list_artifacts(storage) == []
