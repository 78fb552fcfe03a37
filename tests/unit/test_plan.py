"""The arithmetic of a plan against what a tiny run writes, and what it refuses."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import pytest

from gradstore.cluster import Engine, Task
from gradstore.errors import ResourceError
from gradstore.numerics.kernel import spectrum
from gradstore.plan import FILE_BYTES, Plan, make_plan
from gradstore.plan.memory import BLOCKS_OF_SCALES, CHUNKS_AT_ONCE
from gradstore.plan.sizes import RANKED_ROWS, StagePlan, learner_tile, query_tile
from gradstore.spec import KernelSection, RunSpec, read_spec
from gradstore.stages.kernel import build_bundle
from gradstore.stages.progress import Progress
from gradstore.stages.run import STAGES
from gradstore.stages.score.stage import PRECISION_K
from gradstore.stages.self_influence import self_influence
from gradstore.stages.synth import SynthSettings, make_folder
from gradstore.store.artifacts import KernelArtifact, SpectraShape
from gradstore.store.backend import open_storage
from gradstore.store.dtypes import DtypeName
from gradstore.store.features import FeatureStore
from gradstore.store.features.chunks import KEPT_SCALES
from tests.runs import InThisProcess, make_run

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "pipelines" / "openwebtext-llama3-8b" / "run.toml"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"contribute": {"dtype": "float16"}, "kernel": {"kind": "identity"}, "features": {"block_rows": 5}},
        {"model": {"members": [{"name": "early", "eta": 0.5}, {"name": "late"}]}},
        {"features": {"projection": {"kind": "lorif", "rank": 4, "matrices": "pca", "pca_rows": 8}}},
        {"features": {"dtype": "int8"}, "model": {"members": [{"name": "early", "eta": 0.5}, {"name": "late"}]}},
        {"features": {"dtype": "bfloat16", "projection": {"kind": "lorif", "rank": 4}}},
    ],
    ids=[
        "spectra and float32",
        "no spectra and float16",
        "members",
        "factors of principal components",
        "scales of rows, of members",
        "bfloat16 factors",
    ],
)
def test_a_run_writes_the_objects_and_array_bytes_that_were_planned(
    tiny_run: Path, tmp_path: Path, changes: dict[str, dict[str, Any]]
) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    changes = {"score.tail_patch": {"queries": 1}, **changes}
    run = make_run(tmp_path, str(tmp_path / "store"), changes)
    if "kernel" in changes:
        run.write_text(run.read_text(encoding="utf-8").replace("damping = 0.1\n", ""), encoding="utf-8")
    spec = read_spec(run)
    plan = make_plan(spec)
    seen: set[Path] = set()
    for stage, planned in zip(STAGES, plan.stages, strict=True):
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
        written = {path for path in (tmp_path / "store").rglob("*") if path.is_file()} - seen
        seen |= written
        assert len(written) == planned.objects, planned.name
        if planned.name not in ("learn", "score"):
            arrays = [path for path in written if path.name.startswith("c.")]
            chunks = [path.stat().st_size for path in arrays]
            assert sum(chunks) == planned.written_bytes, planned.name
    assert plan.to_json()["objects"] == len(seen)


TWO = [{"name": "early", "eta": 0.5}, {"name": "late"}]
SCORES = {"mode": "scores"}
RELATIF = {"normalize": "relatif"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "contribute", "members"),
    [
        ({"kind": "block"}, {"second_moments": False}, []),
        ({"kind": "block", "damping": [0.1, 1.0]}, {"mode": "streamed", "dtype": "float16"}, []),
        ({"kind": "block", "damping": [0.1, 1.0]}, SCORES, TWO),
        ({"kind": "block", "members": "mean"}, {"normalize": "cosine"}, TWO),
        ({"kind": "diagonal", "damping": [0.1, 1.0, 10.0]}, {"normalize": "cosine"}, []),
        ({"kind": "ekfac"}, RELATIF, TWO),
        ({"kind": "identity"}, {"normalize": "cosine"}, []),
        ({"kind": "full", "route": "primal"}, RELATIF, []),
        ({"kind": "full", "route": "dual", "damping": [0.1, 1.0]}, {"dtype": "float16", **RELATIF}, []),
        ({"kind": "full", "route": "low_rank", "rank": 8, "members": "mean"}, {}, TWO),
        ({"kind": "full"}, {"mode": "streamed"}, []),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(len(value)),
)
def test_every_kernel_and_mode_has_the_tasks_objects_and_array_bytes_that_were_planned(
    tmp_path: Path, kernel: dict[str, Any], contribute: dict[str, Any], members: list[dict[str, Any]]
) -> None:
    values = make_folder(synthetic(tmp_path, 4, 16)).model_dump()
    values["model"] |= {"members": members}
    spec = RunSpec.model_validate({**values, "kernel": kernel, "contribute": contribute})
    plan, engine = make_plan(spec), CountingEngine()
    seen: set[Path] = set()
    for planned in plan.stages:
        engine.tasks = 0
        PLANNED_STAGES[planned.name](spec, cast(Engine, engine), Progress(quiet=True))
        written = {path for path in (tmp_path / "store").rglob("*") if path.is_file()} - seen
        seen |= written
        assert (len(written), engine.tasks) == (planned.objects, planned.tasks), planned.name
        if planned.name not in ("learn", "score"):
            chunks = sum(path.stat().st_size for path in written if path.name.startswith("c."))
            assert chunks == planned.written_bytes, planned.name
        assert planned.task_memory_bytes > 0 or planned.tasks == 0


class CountingEngine(InThisProcess):
    """Counts the tasks that it runs."""

    tasks = 0

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        for done in super().run(tasks):
            self.tasks += 1
            yield done


PLANNED_STAGES: dict[str, Callable[[RunSpec, Engine, Progress], None]] = {
    "featurize": STAGES[0],
    "kernel": STAGES[1],
    "self-influence": self_influence,
    "contribute": STAGES[2],
    "learn": STAGES[3],
    "score": STAGES[4],
}


def synthetic(folder: Path, groups: int, features: int) -> SynthSettings:
    """A synthetic run of 96 rows in blocks of 16, and 11 queries."""
    return SynthSettings(
        folder=folder,
        store=None,
        rows=96,
        queries=6,
        learn_queries=5,
        groups=groups,
        features=features,
        topics=3,
        contributors=2,
        noisy=0.5,
        seed=1,
        dtype="float16",
        block_rows=16,
        kernel="block",
        workers=2,
        memory_per_worker="4GiB",
    )


def test_a_wide_group_is_refused_by_name_with_the_ways_out(tmp_path: Path) -> None:
    spec = make_folder(replace(synthetic(tmp_path, 2, 128 * 128), kernel="diagonal"))
    with pytest.raises(ResourceError) as raised:
        make_plan(spec.model_copy(update={"kernel": KernelSection(kind="block")}))
    told = str(raised.value)
    assert "one task of kernel needs" in told
    assert "(group layers.0.q_proj has 16,384 features, whose Gram matrix is decomposed)" in told
    for way in ("rank", '"diagonal"', '"ekfac"', '"full" with kernel.route = "low_rank"', "cluster.memory_per_worker"):
        assert way in told
    for kind in ("diagonal", "ekfac"):
        make_plan(spec.model_copy(update={"kernel": KernelSection(kind=kind)}))
    low = KernelSection(kind="full", options={"route": "low_rank", "rank": 16})
    make_plan(spec.model_copy(update={"kernel": low}))


def test_the_route_of_the_full_kernel_and_its_reason_are_told() -> None:
    spec = read_spec(REFERENCE)
    full = KernelSection(kind="full", options={"rank": 64})
    notes = make_plan(spec.model_copy(update={"kernel": full})).notes
    (route,) = (note for note in notes if note.startswith("full kernel: "))
    assert route.startswith(
        "full kernel: low_rank: 99,642 rows of 917,504 features: the Gram matrix of 99,642 x 99,642 takes 438 GB"
    )
    assert route.endswith("of a worker: rank 80")


def test_what_the_plan_repeats_of_other_layers_is_what_they_say(tmp_path: Path) -> None:
    assert RANKED_ROWS == PRECISION_K
    assert BLOCKS_OF_SCALES == KEPT_SCALES + 2
    assert CHUNKS_AT_ONCE[0] == open_storage(str(tmp_path)).concurrency


def test_learn_and_ranking_take_no_worker_memory_but_that_of_this_machine(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    run = read_spec(make_run(tmp_path, str(tmp_path / "store"), {"score.tail_patch": {"queries": 0}}))
    stages = stages_of(make_plan(run))
    assert stages["learn"].task_memory_bytes == stages["score"].task_memory_bytes == 0
    most = max(stages["learn"].client_memory_bytes, stages["score"].client_memory_bytes)
    assert most > 0
    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine._replace(total=most - 1))
    with pytest.raises(
        ResourceError, match=r"in the process that runs it, this machine has .* Lower data\.(learn|eval)"
    ):
        make_plan(run)


def test_the_reference_study_is_planned_as_documented() -> None:
    plan = make_plan(read_spec(REFERENCE))
    assert round(plan.to_json()["feature_bytes"] / 1e9, 1) == 182.8
    assert plan.to_json()["task_memory_bytes"] <= 96 * 2**30
    assert "where the command runs" in " ".join(plan.notes)


@pytest.mark.slow
def test_half_precision_counts_the_rounded_weights() -> None:
    spec = read_spec(REFERENCE)

    def featurize(precision: str, token_budget: int) -> int:
        features = spec.features.model_copy(update={"token_budget": token_budget})
        model = spec.model.model_copy(update={"precision": precision})
        cluster = spec.cluster.model_copy(update={"memory_per_worker": "900GiB"})
        changed = spec.model_copy(update={"features": features, "model": model, "cluster": cluster})
        return stages_of(make_plan(changed))["featurize"].task_memory_bytes

    parameters = make_plan(spec).partition.total_parameters
    # Extrapolated to a batch of no token, what is left of the difference is the copies.
    at_none = [2 * featurize(name, 512) - featurize(name, 1024) for name in ("bfloat16", "float32")]
    assert abs(at_none[0] - at_none[1] - 2 * parameters) < 2**20
    for budget in (512, 16_384):
        assert featurize("auto", budget) == max(featurize("bfloat16", budget), featurize("float32", budget))


@pytest.mark.parametrize("spectra", ["block", "identity"])
def test_contribute_counts_the_queries_of_both_sets(spectra: str) -> None:
    spec = read_spec(REFERENCE)
    kernel = spec.kernel.model_copy(update={"kind": spectra, "options": {}})
    spec = spec.model_copy(update={"kernel": kernel})
    fewer = spec.data.model_copy(update={"eval": spec.data.eval.model_copy(update={"rows": 1})})
    both, one = make_plan(spec), make_plan(spec.model_copy(update={"data": fewer}))
    more = stages_of(both)["contribute"].task_memory_bytes - stages_of(one)["contribute"].task_memory_bytes
    block_rows, groups = both.sets["train"].block_rows, len(both.widths)
    # C of two blocks; products of a tile of rows are as many bytes whatever the queries.
    assert more == pytest.approx(499 * 4 * (both.features + 2 * block_rows * groups), rel=1e-4)
    # A bundle's Gram matrices take 1 GiB, each with the rows of its next product.
    assert stages_of(both)["kernel"].tasks == (42 if spectra == "block" else 0)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_the_plan_says_what_the_train_features_take_in_every_dtype(dtype: str) -> None:
    spec = read_spec(REFERENCE)
    features = spec.features.model_copy(update={"dtype": dtype})
    plan = make_plan(spec.model_copy(update={"features": features}))
    rows = plan.sets["train"].rows
    numbers, scales = rows * sum(plan.widths), 4 * rows * 224
    assert plan.to_json()["dtype_bytes"] == {
        "float32": 4 * numbers,
        "float16": 2 * numbers,
        "bfloat16": 2 * numbers,
        "int8": numbers + scales,
    }
    assert plan.sets["train"].feature_bytes == plan.dtype_bytes[dtype]
    assert plan.sets["eval"].dtype == "float32"
    assert set(plan.to_json()["dtype_errors"]) == set(plan.dtype_bytes)


def test_a_compressed_store_takes_no_more_than_planned_and_says_that_it_may_take_less() -> None:
    spec = read_spec(REFERENCE)
    packed = spec.model_copy(update={"features": spec.features.model_copy(update={"compression": "blosc"})})
    plain, compressed = make_plan(spec), make_plan(packed)
    assert compressed.sets["train"].feature_bytes == plain.sets["train"].feature_bytes
    assert any("before compression, which saved 5% of float16" in note for note in compressed.notes)
    # Chunks are held both as they are stored and as they are read.
    more = stages_of(compressed)["kernel"].task_memory_bytes - stages_of(plain)["kernel"].task_memory_bytes
    assert more >= CHUNKS_AT_ONCE[0] * plain.sets["train"].largest_chunk_bytes


def test_learn_writes_weights_once_an_epoch() -> None:
    spec = read_spec(REFERENCE)
    longer = spec.model_copy(update={"learn": spec.learn.model_copy(update={"epochs": spec.learn.epochs + 1})})
    more = stages_of(make_plan(longer))["learn"].written_bytes - stages_of(make_plan(spec))["learn"].written_bytes
    assert more == 8 * 224 + 32 * 500


def test_block_rows_that_make_chunks_too_large_are_refused() -> None:
    spec = read_spec(REFERENCE)
    features = spec.features.model_copy(update={"block_rows": 8192})
    # 4,096 features of two bytes: 8,192 rows are 64 MiB in the train set, and twice that in the sets of queries.
    with pytest.raises(
        ResourceError, match=r"features.block_rows: 8192 rows .* 134 MB in the float32 set .* most 4096"
    ):
        make_plan(spec.model_copy(update={"features": features}))


def test_a_disk_is_too_full_only_for_what_is_still_missing(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    spec = read_spec(make_run(tmp_path, str(tmp_path / "store")))
    needed = sum(stage.written_bytes + stage.objects * FILE_BYTES for stage in make_plan(spec).stages)
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2 * needed, 0, needed - 1_000_000))
    (tmp_path / "store").mkdir()
    with pytest.raises(ResourceError, match="the run still writes"):
        make_plan(spec)
    (tmp_path / "store" / "features").write_bytes(bytes(1_100_000))
    make_plan(spec)


def test_a_bundle_of_groups_is_stored_as_decomposed_one_by_one(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    spec = read_spec(make_run(tmp_path, str(tmp_path / "store")))
    for stage in STAGES[:2]:
        stage(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    store = FeatureStore.open(spec.run.store)
    train, made = store.open_set("train"), KernelArtifact.open(store.storage, "block", "m0")
    names = [array.name for array in train.info.arrays]
    artifact = KernelArtifact.create(
        store.storage,
        "three",
        "m0",
        settings={"kind": "block"},
        shape=SpectraShape(widths=dict.fromkeys(names, 16)),
        bundles=[names[:3], names[3:]],
    )
    assert build_bundle(spec.run.store, "three", "m0", 0) == 3
    for name in names[:3]:
        rows = np.concatenate([train.read_block(block, [name])[name] for block in range(train.info.num_blocks)])
        values, vectors = artifact.read(name)
        expected = spectrum(rows.T.astype(np.float64) @ rows)
        assert np.abs(values - expected.eigenvalues).max() <= 1e-5 * expected.eigenvalues.max()
        np.testing.assert_array_equal(vectors, made.read(name)[1])
    assert artifact.missing_units() == [1]


def stages_of(plan: Plan) -> dict[str, StagePlan]:
    return {stage.name: stage for stage in plan.stages}


@pytest.mark.parametrize("rows", [256, 1024, 4096])
@pytest.mark.parametrize(("dtype", "item"), [("float32", 4), ("float16", 2)])
def test_chunks_of_contributions_are_of_8_to_32_mebibytes(rows: int, dtype: DtypeName, item: int) -> None:
    tile = query_tile((500, 100_000, 224), rows, dtype)
    assert 8 * 2**20 <= tile * rows * 224 * item <= 32 * 2**20


def test_the_learner_visits_queries_in_the_same_tiles_however_c_is_stored() -> None:
    shape = (500, 100_000, 224)
    assert learner_tile(shape) == 2 * 2**30 // (4 * 100_000 * 224)
    assert learner_tile((60, 400, 210)) == 60
