"""How contribute is cut, and what it is planned to write: against what it writes to stores in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from gradstore.cluster import Engine
from gradstore.plan.contribute import num_spans, part_rows, query_passes, read_bundles, tile_rows
from gradstore.plan.contributions import contribute_notes, contribute_stage, plan_contribute
from gradstore.plan.sizes import SetPlan, Widths, query_tile
from gradstore.stages.contribute import contribute
from gradstore.stages.contribute.queries import Slab, Target
from gradstore.stages.contribute.span import Work, slabs_of
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.store.features import FeatureStore
from tests.contributing import GROUPS, make_spec, make_store
from tests.runs import InThisProcess

MIB = 2**20


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", [(500, 100_000, 224), (500, 1_000_000, 224), (500, 20_000, 224), (64, 20_000, 48)])
def test_chunks_of_c_are_of_8_to_32_mib_where_there_are_queries_enough(shape: tuple[int, int, int], dtype: Any) -> None:
    queries, _, groups = shape
    item = 4 if dtype == "float32" else 2

    for block_rows in (256, 1024):
        tile = query_tile(shape, block_rows, dtype)
        chunk = tile * block_rows * groups * item
        assert 1 <= tile <= queries
        assert chunk <= 32 * MIB
        assert chunk >= 6 * MIB or tile == queries


def test_a_tile_is_of_few_rows_where_queries_are_many_and_of_many_where_they_are_few() -> None:
    assert [tile_rows(queries, 224) for queries in (1, 64, 500, 5000)] == [1024, 1024, 128, 64]


def test_parts_of_a_block_are_of_whole_tiles() -> None:
    assert [part_rows(1000, 64, parts) for parts in (1, 2, 4, 100)] == [1000, 512, 256, 64]


def test_groups_are_read_in_bundles_of_at_least_one() -> None:
    assert read_bundles({"a": 4, "b": 4, "c": 40, "d": 1}, 2, 64) == [["a", "b"], ["c"], ["d"]]


def test_queries_and_c_that_pass_a_quarter_of_the_memory_take_several_passes() -> None:
    assert [query_passes(held, built, 400, 1) for held, built in ((100, 100), (101, 1), (1, 350))] == [
        (1, 1),
        (2, 2),
        (4, 4),
    ]


def test_a_longer_sweep_takes_more_passes_but_cuts_the_queries_of_a_kernel_alike() -> None:
    assert [query_passes(50, 1, 400, kernels) for kernels in (1, 2, 3)] == [(1, 1), (1, 1), (1, 2)]
    assert [query_passes(60, 1, 400, kernels) for kernels in (1, 2, 3)] == [(1, 1), (1, 2), (1, 3)]
    assert [query_passes(140, 1, 400, kernels) for kernels in (1, 2, 3)] == [(2, 2), (2, 4), (2, 6)]


def test_spans_are_few_where_what_is_summed_of_each_is_much() -> None:
    assert num_spans(3, 20_000, 224) == 3
    assert [num_spans(1000, rows, 224) for rows in (1000, 20_000, 1_000_000)] == [16, 22, 128]


def test_passes_take_whole_tiles_of_all_targets_in_order() -> None:
    first, second = (Target(kernel="block", set_name=name) for name in ("learn", "eval"))
    work = Work(blocks=(), tiles=((5, 2), (3, 3)), parts=2, passes=2)

    assert slabs_of([first, second], work) == [
        [Slab(target=first, first=0, last=4)],
        [Slab(target=first, first=4, last=5), Slab(target=second, first=0, last=3)],
    ]


def test_passes_cut_the_queries_of_a_kernel_whatever_other_kernels_there_are() -> None:
    targets = [Target(kernel=kernel, set_name=name) for kernel in ("x", "y") for name in ("learn", "eval")]
    work = Work(blocks=(), tiles=((5, 2), (3, 3)) * 2, parts=2, passes=2)
    alone = slabs_of(targets[:2], replace(work, tiles=work.tiles[:2], passes=1))

    first, second = slabs_of(targets, work)

    assert [first] == alone
    assert [(slab.first, slab.last) for slab in second] == [(slab.first, slab.last) for slab in first]


@pytest.mark.parametrize(
    "contribute_section",
    [
        {"dtype": "float16"},
        {"mode": "streamed"},
        {"mode": "scores"},
        {"second_moments": False},
    ],
    ids=str,
)
def test_every_mode_of_a_sweep_writes_the_objects_and_bytes_that_were_planned(
    contribute_section: dict[str, Any],
) -> None:
    store = make_store()
    kernel = {"kind": "block", "damping": [0.1, 1.0], "mode": "relative"}
    spec = make_spec(store, kernel=kernel, contribute=contribute_section)
    build_kernel(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    before = objects(store)
    full = tuple(rows * columns for rows, columns in GROUPS.values())
    widths = Widths(stored=full, full=full, sides=tuple((shape,) for shape in GROUPS.values()))
    sets = {name: planned(store, name) for name in ("train", "learn", "eval")}

    cut = plan_contribute(spec, widths, sets)
    stage = contribute_stage(spec, cut, sets["train"], task_memory_bytes=0)
    contribute(spec, cast(Engine, InThisProcess()), Progress(quiet=True))

    written = {path: size for path, size in objects(store).items() if path not in before}
    assert len(written) == stage.objects
    assert (
        sum(size for path, size in written.items() if path.rpartition("/")[2].startswith("c.")) == stage.written_bytes
    )
    assert contribute_notes(cut) == []


def objects(store: FeatureStore) -> dict[str, int]:
    return {info.path: info.bytes for info in store.storage.list_objects("")}


def planned(store: FeatureStore, name: str) -> SetPlan:
    info = store.open_set(name).info
    return SetPlan(
        name=name,
        rows=info.rows,
        length=1,
        dtype=info.dtype,
        compression="none",
        block_rows=info.block_rows,
        blocks=info.num_blocks,
        objects=0,
        feature_bytes=0,
        largest_chunk_bytes=0,
    )
