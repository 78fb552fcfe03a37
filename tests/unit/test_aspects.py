"""Aspects: what run.toml may say of them, which rows they take, and what contribute makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from gradstore.adapters.diffusion.adapter import Diffusion
from gradstore.adapters.own.splits import split_own
from gradstore.adapters.text.splits import split_examples
from gradstore.cluster import Engine
from gradstore.errors import DataError, SpecError
from gradstore.plan.contributions import contribute_stage, plan_contribute
from gradstore.plan.sizes import Widths
from gradstore.spec import DataSection, ModelSection, RunSpec, parse_spec
from gradstore.stages.contribute import contribute
from gradstore.stages.contribute.queries import Slab, Target
from gradstore.stages.contribute.span import Work, slabs_of
from gradstore.stages.kernel import build_kernel
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import ContributionArtifact, MomentsArtifact
from tests.classifiers import classifier, networks
from tests.contributing import GROUPS, ROWS, expected_c, make_spec, make_store, run, stored_c
from tests.pictures import draw, encode, write_npz, write_parquet
from tests.runs import InThisProcess
from tests.texts import CharacterEncoder, Echo, spell
from tests.unets import on_path
from tests.unit.test_contribute_cuts import objects, planned

STYLE = {"style": {"source": "style.txt"}}
WITH_STYLE = {**ROWS, "learn-style": 3}
SPLITS: dict[str, Any] = {"train": {"rows": 5}, "learn": {"rows": 2, "length": 12}, "eval": {"rows": 2}}


def parsed(aspects: Any, **data: Any) -> RunSpec:
    tables = {"source": "texts", "length": 24, **SPLITS, **data, "aspects": aspects}
    return parse_spec({"run": {"name": "a", "store": "s"}, "model": {"source": "m"}, "data": tables})


def test_an_aspect_is_a_set_of_queries_with_weights_of_its_own_name() -> None:
    spec = parsed({"style": {"rows": 2}, "subject": {"source": "other"}})

    assert spec.data.query_sets() == ("learn", "eval", "learn-style", "learn-subject")
    assert spec.data.learn_sets() == ("learn", "learn-style", "learn-subject")
    assert spec.learn_targets() == [
        ("learn", "learned"),
        ("learn-style", "learned-style"),
        ("learn-subject", "learned-subject"),
    ]
    assert RunSpec.model_validate(spec.model_dump()) == spec


def test_aspects_take_their_rows_after_all_others_and_are_cut_as_data_learn_is() -> None:
    spec = parsed({"style": {"rows": 2}, "subject": {"rows": 3}})

    assert spec.data.ranges() == {
        "train": (0, 5),
        "learn": (5, 7),
        "eval": (7, 9),
        "learn-style": (9, 11),
        "learn-subject": (11, 14),
    }
    assert [split.length for split in spec.data.splits().values()] == [24, 12, 24, 12, 12]


def test_the_weights_of_a_sweep_end_in_the_damping_and_the_aspect() -> None:
    spec = parsed({"style": {"rows": 2}})
    swept = spec.model_copy(
        update={"kernel": spec.kernel.model_copy(update={"options": {"damping": [0.1, 1.0]}})}
    ).sweep()

    assert [name for run in swept for _, name in run.learn_targets()] == [
        "learned_0p1",
        "learned_0p1-style",
        "learned_1",
        "learned_1-style",
    ]


@pytest.mark.parametrize(
    ("aspects", "message"),
    [
        (3, "data.aspects: found 3; accepted: a valid dictionary."),
        ({"style": 3}, "data.aspects.style: found 3; accepted: a valid dictionary"),
        ({"style": {"rows": 0}}, "data.aspects.style.rows: found 0; accepted: greater than or equal to 1."),
        ({"style": {"row": 1}}, "data.aspects.style.row: unknown key; accepted here: source, format,"),
        ({"eval": {}}, "data.aspects: found the name 'eval', which is another split's; accepted: letters, digits"),
        ({"my style": {}}, "data.aspects: found the name 'my style'; accepted: letters, digits, and after the first"),
        ({"a\n": {}}, r"data.aspects: found the name 'a\n'; accepted: letters"),
        (
            {"style": {"length": 24}},
            "data.aspects.style.length: found 24; aspects are cut as data.learn is, which has 12.",
        ),
        ({"style": {"packing": "concatenate"}}, "data.aspects.style.packing: found 'concatenate'; aspects are cut as"),
        (
            {"style": {"start": 8, "rows": 1}},
            "data.aspects.style: rows [8, 9) of texts overlap rows [7, 9) of data.eval.",
        ),
        (
            {"style": {"start": 4, "rows": 2}},
            "data.aspects.style: rows [4, 6) of texts overlap rows [0, 5) of data.train.",
        ),
        (
            {"one": {}, "two": {"rows": 1}},
            "data.aspects.two: data.aspects.one declares no rows, so it takes all of the",
        ),
    ],
    ids=str,
)
def test_what_an_aspect_may_not_be_is_refused_by_name(aspects: Any, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        parsed(aspects)

    assert message in str(refused.value)


def test_an_aspect_has_no_rows_to_take_after_an_eval_split_that_takes_all() -> None:
    with pytest.raises(SpecError, match=r"data.aspects.style: data.eval declares no rows, .* Set data.eval.rows"):
        parsed({"style": {"rows": 1}}, eval={})


def texts(folder: Path, **splits: Any) -> dict[str, list[str]]:
    """The texts of every split of two files, of which the second repeats a text of the first."""
    for file, lines in {"x": [f"text {n}" for n in range(9)], "y": ["text 4", "other"]}.items():
        (folder / f"{file}.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    shared = {"source": str(folder / "x.jsonl"), "shuffle": False, "length": 8}
    data = DataSection.model_validate({**shared, "train": {"rows": 3}, "learn": {"rows": 2}, **splits})
    found = split_examples(data, 0, CharacterEncoder(), Echo()).splits
    return {name: [spell(example.inputs["tokens"]) for example in rows] for name, rows in found.items()}


def test_an_aspect_may_share_texts_with_the_other_sets_to_learn_from(tmp_path: Path) -> None:
    aspects = {"one": {"start": 4, "rows": 1}, "two": {"source": str(tmp_path / "y.jsonl")}}

    found = texts(tmp_path, eval={"start": 5, "rows": 2}, aspects=aspects)

    assert found["learn"] == ["^text 3", "^text 4"]
    assert (found["learn-one"], found["learn-two"]) == (["^text 4"], ["^text 4", "^other"])


@pytest.mark.parametrize(
    ("train", "evaluated", "other"),
    [(5, {"start": 7, "rows": 2}, "train"), (3, {"start": 4, "rows": 2}, "eval")],
    ids=["train", "eval"],
)
def test_a_text_of_an_aspect_that_is_in_train_or_eval_is_an_overlap(
    tmp_path: Path, train: int, evaluated: dict[str, int], other: str
) -> None:
    splits = {"train": {"rows": train}, "learn": {"rows": 1}, "eval": evaluated}

    with pytest.raises(DataError) as refused:
        texts(tmp_path, **splits, aspects={"style": {"source": str(tmp_path / "y.jsonl")}})

    assert "data.aspects.style: " in str(refused.value)
    assert f"in data.{other}" in str(refused.value)


def test_joined_rows_are_the_same_whatever_rows_of_them_an_aspect_shares(tmp_path: Path) -> None:
    splits: dict[str, Any] = {"packing": "concatenate", "train": {"rows": 2}, "eval": {"rows": 1}}

    alone = texts(tmp_path, **splits)
    shared = texts(tmp_path, **splits, aspects={"style": {"start": 3, "rows": 1}})

    assert {name: shared[name] for name in alone} == alone
    assert shared["learn-style"] == alone["learn"][1:2]


def test_a_model_goes_on_from_training_texts_for_an_aspect_too(tmp_path: Path) -> None:
    prompted = {"generate": {"prompts": "train", "prompt_tokens": 8, "new_tokens": 2}, "rows": 1, "length": 10}

    found = texts(tmp_path, learn=prompted, eval=prompted, aspects={"style": prompted})

    # The writer counts up from the last letter of the prompt.
    assert [found[name] for name in ("learn", "eval", "learn-style")] == [["^text 012"], ["^text 123"], ["^text 234"]]


def test_the_source_of_an_aspect_is_asked_of_an_adapter_of_ones_own() -> None:
    held = {"numbers": range(9), "odd": (3, 11)}
    splits: dict[str, Any] = {"train": {"rows": 3}, "learn": {"rows": 2}, "eval": {"rows": 2}}

    def read(source: str, split: str) -> Iterator[Any]:
        return iter([{"id": f"{source}-{n}", "inputs": {"x": n}} for n in held[source]])

    def examples(**splits: Any) -> dict[str, list[str]]:
        data = DataSection.model_validate({"source": "numbers", "shuffle": False, **splits})
        found = split_own(data, 0, "own:adapter", read).splits
        return {name: [example.example_id for example in rows] for name, rows in found.items()}

    found = examples(**splits, aspects={"one": {"rows": 1}, "two": {"source": "odd"}})

    assert (found["learn-one"], found["learn-two"]) == (["numbers-7"], ["odd-3", "odd-11"])
    with pytest.raises(
        DataError, match=r"data.aspects.two: odd-3 of odd has the inputs of numbers-3 of numbers in data.train"
    ):
        examples(**{**splits, "train": {"rows": 4}, "learn": {"rows": 1}}, aspects={"two": {"source": "odd"}})


def test_images_of_an_aspect_leave_the_order_of_the_classes_as_it_is(tmp_path: Path) -> None:
    images, classes = draw(12)
    names = [("bird", "cat", "dog")[number] for number in classes]
    more, _ = draw(2, seed=1)
    source = write_parquet(tmp_path / "a.parquet", [encode(pixels) for pixels in images], names)
    style = write_parquet(tmp_path / "b.parquet", [encode(pixels) for pixels in more], ["dog", "ant"])
    splits = {"label": "label", "train": {"rows": 6}, "learn": {"rows": 3}, "eval": {"rows": 3}}
    with networks(tmp_path) as module:
        alone = classifier(f"{module}:make", source, splits=splits)
        aspect = {"style": {"source": str(style), "rows": 1}}
        both = classifier(f"{module}:make", source, splits={**splits, "shuffle": False, "aspects": aspect})

        assert both.identity() == alone.identity()
        assert [example.label for example in both.examples().splits["learn-style"]] == ["dog"]
        aspect = {"style": {"source": str(style), "rows": 2}}
        with pytest.raises(
            DataError, match=r"data.aspects.style: the label of .* is 'ant', which is none of the classes"
        ):
            classifier(f"{module}:make", source, splits={**splits, "aspects": aspect}).examples()


@pytest.fixture
def unet(tmp_path: Path) -> Iterator[str]:
    with on_path(tmp_path) as name:
        yield name


def test_a_diffusion_model_makes_the_images_of_an_aspect(unet: str, tmp_path: Path) -> None:
    archive = write_npz(tmp_path / "a.npz", *draw(9))
    made = {"source": "made", "generate": {"steps": 2}}
    splits = {"train": {"rows": 6}, "learn": {"rows": 3}, "eval": {**made, "rows": 2}}

    def diffusion(aspect: dict[str, Any]) -> Diffusion:
        model = ModelSection(adapter="diffusion", source=f"{unet}:make", options={"arguments": {}})
        data = {"source": str(archive), **splits, "aspects": {"style": aspect}}
        return Diffusion(model, DataSection.model_validate(data), 5)

    found = diffusion({**made, "rows": 2}).examples().splits

    assert [example.example_id for example in found["eval"]] == ["sample-0-0", "sample-0-1"]
    assert [example.example_id for example in found["learn-style"]] == ["sample-0-2", "sample-0-3"]
    with pytest.raises(DataError, match=r"data.aspects.style: sample-0-0 has the pixels of sample-0-0 in data.eval"):
        diffusion({**made, "source": "again", "rows": 1}).examples()


@pytest.mark.parametrize("mode", ["tensor", "streamed"])
def test_what_is_built_of_the_others_has_the_same_bits_whatever_aspects_there_are(mode: str) -> None:
    alone, both = make_store(), make_store(rows=WITH_STYLE)

    run(make_spec(alone, contribute={"mode": mode}))
    run(make_spec(both, contribute={"mode": mode}, data={"aspects": STYLE}))

    if mode == "tensor":
        for name in ("learn", "eval"):
            np.testing.assert_array_equal(stored_c(both, name), stored_c(alone, name))
        np.testing.assert_allclose(stored_c(both, "learn-style"), expected_c(both, "learn-style"), rtol=2e-5, atol=1e-6)
    moments = [MomentsArtifact.open(store.storage, ("block", "learn")) for store in (alone, both)]
    for span in range(moments[0].shape.num_spans):
        ours, theirs = (artifact.read_span(span) for artifact in moments)
        np.testing.assert_array_equal(ours.second_moments, theirs.second_moments)
        np.testing.assert_array_equal(ours.candidates, theirs.candidates)
    assert MomentsArtifact.open(both.storage, ("block", "learn-style")).is_complete()
    assert MomentsArtifact.find_named(both.storage, "block", "eval") is None


@pytest.mark.parametrize(("dtype", "close"), [("float32", 2e-5), ("float16", 2e-3)])
def test_an_aspect_that_is_added_is_all_that_is_built(dtype: str, close: float) -> None:
    store, tasks = make_store(rows=WITH_STYLE), list[str]()
    settings = {"contribute": {"dtype": dtype}}

    class Counting(InThisProcess):
        def run(self, given: Any) -> Any:
            tasks.extend(task.name for task in given)
            return super().run(given)

    run(make_spec(store, **settings))
    before = ContributionArtifact.open(store.storage, "block", "learn").log.require(0, "there").attempt
    run(make_spec(store, **settings, data={"aspects": STYLE}), Counting())

    scaled = ["scales-block"] if dtype == "float16" else []
    spans = [f"contribute-block-learn-style-{block:06d}" for block in range(3)]
    assert tasks == ["queries-block-learn-style-m0", *scaled, *spans]
    assert ContributionArtifact.open(store.storage, "block", "learn").log.require(0, "there").attempt == before
    expected = expected_c(store, "learn-style")
    np.testing.assert_allclose(
        stored_c(store, "learn-style"), expected, rtol=close, atol=close * np.abs(expected).max()
    )


def test_passes_cut_the_queries_of_an_aspect_by_themselves() -> None:
    targets = [Target(kernel="block", set_name=name) for name in ("learn", "eval", "learn-style")]
    work = Work(blocks=(), tiles=((5, 2), (3, 3), (4, 2)), parts=2, passes=2)
    alone = slabs_of(targets[:2], replace(work, tiles=work.tiles[:2], passes=1))

    first, second = slabs_of(targets, work)

    assert [first] == alone
    assert second == [Slab(target=targets[2], first=0, last=2), Slab(target=targets[2], first=2, last=4)]


@pytest.mark.parametrize("section", [{}, {"dtype": "float16"}, {"mode": "streamed"}, {"mode": "scores"}], ids=str)
def test_what_contribute_writes_of_aspects_was_planned(section: dict[str, Any]) -> None:
    store = make_store(rows=WITH_STYLE)
    spec = make_spec(store, contribute=section, data={"aspects": STYLE})
    build_kernel(spec, cast(Engine, InThisProcess()), Progress(quiet=True))
    before = objects(store)
    full = tuple(rows * columns for rows, columns in GROUPS.values())
    widths = Widths(stored=full, full=full, sides=tuple((shape,) for shape in GROUPS.values()))
    sets = {name: planned(store, name) for name in WITH_STYLE}

    stage = contribute_stage(spec, plan_contribute(spec, widths, sets), sets["train"], task_memory_bytes=0)
    contribute(spec, cast(Engine, InThisProcess()), Progress(quiet=True))

    written = {path: size for path, size in objects(store).items() if path not in before}
    assert len(written) == stage.objects
    chunks = [size for path, size in written.items() if path.rpartition("/")[2].startswith("c.")]
    assert sum(chunks) == stage.written_bytes
