from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from gradstore.errors import SpecError
from gradstore.groups import Grouping
from gradstore.spec import RunSpec, content_hash, differences, parse_spec, read_spec, resolve_kind

Values = dict[str, Any]
MINIMAL: Values = {
    "run": {"name": "a", "store": "x"},
    "model": {"source": "m"},
    "data": {"source": "d", "train": {"rows": 4}, "learn": {"rows": 2}, "eval": {"rows": 3}},
}


def changed(change: Callable[[Values], object]) -> Values:
    values = copy.deepcopy(MINIMAL)
    change(values)
    return values


def test_splits_of_one_source_take_consecutive_rows() -> None:
    assert parse_spec(MINIMAL).data.ranges() == {"train": (0, 4), "learn": (4, 6), "eval": (6, 9)}


def test_splits_of_different_sources_each_start_at_their_first_row() -> None:
    spec = parse_spec(changed(lambda v: v["data"]["eval"].update(source="other")))
    assert spec.data.ranges()["eval"] == (0, 3)


def test_keys_of_a_split_win_over_the_shared_defaults() -> None:
    spec = parse_spec(changed(lambda v: (v["data"].update(length=96), v["data"]["eval"].update(length=48))))
    assert (spec.data.train.length, spec.data.eval.length) == (96, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["run"].update(stor=1), r"run\.stor: unknown key; accepted here: name, store, seed"),
        (lambda v: v.update(foo={}), r"foo: unknown key; accepted here: run, model, data"),
        (lambda v: v["data"]["learn"].update(nope=1), r"data\.learn\.nope: unknown key; accepted here: source, format"),
        (lambda v: v["data"]["train"].update(rows="4"), r"data\.train\.rows: found '4'; accepted: a valid integer"),
        (lambda v: v["data"]["train"].update(rows=0), r"data\.train\.rows: found 0; accepted: greater than or equal"),
        (lambda v: v["model"].update(precision="fp8"), r"precision: found 'fp8'; accepted: 'auto', 'float32' or"),
        (
            lambda v: v.update(sketch={"rank": 0}),
            r"run\.toml: sketch\.rank: found 0; accepted: greater than or equal to 1, or 'auto'\.$",
        ),
        (lambda v: v["data"].pop("source"), r"data\.train\.source: is missing"),
        (lambda v: v.pop("model"), r"model: is missing"),
        (
            lambda v: v["data"]["eval"].update(start=1),
            r"data\.eval: rows \[1, 4\) of d overlap rows \[0, 4\) of data\.train",
        ),
        (lambda v: v["data"]["train"].pop("rows"), r"data\.train declares no rows, so it takes all of the source"),
        (lambda v: v.update(features={"groups": 3}), r"features\.groups: found 3"),
        (
            lambda v: v.update(features={"dtype": "float8"}),
            r"features\.dtype: found 'float8'; accepted: 'float32', 'float16', 'bfloat16' or 'int8'",
        ),
        (
            lambda v: v.update(features={"compression": "zip"}),
            r"features\.compression: found 'zip'; accepted: 'none' or 'blosc'",
        ),
        (lambda v: v.update(contribute={"dtype": "int8"}), r"contribute\.dtype: found 'int8'; accepted: 'float32' or"),
        (
            lambda v: v.update(learn={"name": "unweighted"}),
            r"learn\.name: found 'unweighted', which has another meaning",
        ),
        (lambda v: v.update(kernel={"name": "a.b"}), r"kernel\.name: found 'a\.b'"),
        (
            lambda v: v.update(learn={"learning_rate": float("inf")}),
            r"learn\.learning_rate: found inf; accepted: a finite",
        ),
        (
            lambda v: v["model"].update(members=[{"name": "inputs"}]),
            "found the name inputs, which is another folder's",
        ),
        (lambda v: v["run"].update(name="../up"), r"run\.name: found '\.\./up'"),
        (lambda v: v.update(kernel={"damping": []}), r"kernel\.damping: found \[\]; accepted: a number, or a list of"),
        (lambda v: v.update(kernel={"damping": [0.1, "x"]}), r"kernel\.damping: found \[0\.1, 'x'\]"),
        (lambda v: v.update(kernel={"damping": [0.1, 0.1]}), r"accepted: a number, or a list of different numbers"),
        (
            lambda v: v.update(contribute={"weights": "learned"}),
            r"contribute\.weights: found 'learned' with mode = \"tensor\"; C has no weights in it",
        ),
    ],
)
def test_what_run_toml_may_not_say_is_refused_with_key_found_and_accepted(
    change: Callable[[Values], object], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(changed(change))


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(changed(lambda v: (v["run"].update(stor=1), v["model"].update(precision="fp8"))))
    assert "run.stor" in str(caught.value)
    assert "model.precision" in str(caught.value)


def test_a_spec_survives_a_round_trip_through_plain_values() -> None:
    spec = parse_spec(changed(lambda v: v.update(kernel={"kind": "block", "damping": 0.5})))
    assert spec.kernel.options == {"damping": 0.5}
    assert spec.kernel.name == "block"
    assert type(spec).model_validate(spec.model_dump()) == spec
    assert type(spec).model_validate_json(spec.model_dump_json()) == spec


def test_a_list_of_dampings_is_one_run_for_each_with_a_kernel_and_weights_of_its_own() -> None:
    spec = parse_spec(changed(lambda v: v.update(kernel={"kind": "block", "damping": [0.01, 1, 1e-5, 0.010000001]})))
    found = [(run.kernel.name, run.learn.name, run.kernel.options) for run in spec.sweep()]
    assert found == [
        ("block_0p01", "learned_0p01", {"damping": 0.01}),
        ("block_1", "learned_1", {"damping": 1.0}),
        ("block_1e-05", "learned_1e-05", {"damping": 1e-5}),
        ("block_0p010000001", "learned_0p010000001", {"damping": 0.010000001}),
    ]
    assert all(parse_spec(run.model_dump()) == run for run in spec.sweep())


def test_one_damping_is_a_sweep_of_the_run_itself() -> None:
    spec = parse_spec(changed(lambda v: v.update(kernel={"kind": "block", "damping": 0.5})))
    assert spec.sweep() == [spec]


def test_a_missing_file_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"gone\.toml: no such file"):
        read_spec(tmp_path / "gone.toml")
    (tmp_path / "broken.toml").write_text("[run\n")
    with pytest.raises(SpecError, match=r"broken\.toml: not readable as TOML"):
        read_spec(tmp_path / "broken.toml")


def test_paths_are_relative_to_the_file_and_the_store_to_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "run.toml").write_text(
        '[run]\nname="a"\nstore="runs/a"\n[model]\nsource="org/model"\nconfig="config.json"\n'
        '[data]\nsource="texts"\n[data.train]\nrows=1\n[data.learn]\nrows=1\n[data.eval]\nrows=1\n'
    )
    spec = read_spec(tmp_path / "run.toml")
    assert spec.run.store == str(Path.cwd() / "runs" / "a")
    assert spec.model.source == "org/model"
    assert spec.model.config == str(tmp_path / "config.json")
    assert spec.data.train.source == str(tmp_path / "texts")


def test_weights_members_and_files_of_labels_are_found_beside_the_file_too(tmp_path: Path) -> None:
    for name in ("net.pt", "first.pt", "images.idx", "labels.idx"):
        (tmp_path / name).touch()
    (tmp_path / "run.toml").write_text(
        '[run]\nname="a"\nstore="runs/a"\n[model]\nsource="nets:make"\nweights="net.pt"\n'
        '[[model.members]]\nname="first"\nweights="first.pt"\n[[model.members]]\nname="last"\n'
        '[data]\nsource="images.idx"\nlabels="labels.idx"\n'
        "[data.train]\nrows=1\n[data.learn]\nrows=1\n[data.eval]\nrows=1\n"
    )

    spec = read_spec(tmp_path / "run.toml")

    assert spec.model.source == "nets:make"
    assert spec.model.of_member("first").weights == str(tmp_path / "first.pt")
    assert spec.model.of_member("last").weights == str(tmp_path / "net.pt")
    assert spec.data.eval.labels == str(tmp_path / "labels.idx")


@dataclass(frozen=True)
class Round:
    radius: int
    colour: Literal["red", "blue"] = "red"


def test_every_field_of_a_grouping_is_a_key_with_the_same_default() -> None:
    assert parse_spec(MINIMAL).features.groups.model_dump() == asdict(Grouping())


def test_patterns_keep_the_order_of_the_file_because_the_first_that_matches_counts(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        '[run]\nname="a"\nstore="x"\n[model]\nsource="m"\n[data]\nsource="d"\n[data.train]\nrows=4\n[data.learn]\nrows=2\n'
        '[data.eval]\nrows=3\n[features.groups]\nrule="patterns"\n[features.groups.patterns]\n"z"="a.*"\n"a"=".*"\n',
        encoding="utf-8",
    )
    spec = read_spec(path)
    sent = RunSpec.model_validate_json(spec.model_dump_json())

    assert list(sent.features.groups.patterns.items()) == [("z", "a.*"), ("a", ".*")]


def test_a_kind_is_made_from_its_options() -> None:
    assert resolve_kind({"round": Round}, "round", {"radius": 3}, "shape") == Round(radius=3)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("square", {}, r"shape\.kind: found 'square'; accepted: round"),
        ("round", {"radius": 1, "width": 2}, r"shape\.width: unknown key; accepted for round: radius, colour"),
        ("round", {"radius": "3"}, r"shape\.radius: found '3'; accepted: a valid integer"),
        ("round", {}, r"shape\.radius: is missing"),
        ("round", {"radius": 1, "colour": "green"}, r"shape\.colour: found 'green'; accepted: 'red' or 'blue'"),
    ],
)
def test_an_unknown_kind_or_option_is_refused(kind: str, options: Values, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        resolve_kind({"round": Round}, kind, options, "shape")


def test_differences_name_every_field_with_both_values() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}) == [
        ("a.c", 2, 5),
        ("d", 3, None),
        ("e", None, 4),
    ]


def test_the_content_hash_ignores_the_order_of_keys() -> None:
    assert content_hash({"a": 1, "b": [2, 3]}) == content_hash({"b": [2, 3], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
