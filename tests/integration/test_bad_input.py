"""What cannot be used, given to the installed command line: one line that names it, and nothing committed for it.

A sequence longer than the model's context and a missing column of labels are in tests/unit/test_cli.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gradstore.store.features import FeatureStore
from tests.pictures import CLASSES, draw, encode, write_parquet
from tests.runs import gradstore, make_run
from tests.tasks import MODULE, write_own_run, write_run


def refused(run: Path, *, code: int) -> str:
    """What the command says, in one line."""
    found = gradstore("featurize", run, "--quiet", env={"PYTHONPATH": str(run.parent)}, cwd=run.parent)
    assert found.returncode == code, found.stderr
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    *_, last = found.stderr.strip().splitlines()
    assert last.startswith("error: "), found.stderr
    return last


def committed(store: Path) -> Iterator[str]:
    """The ids of the examples that the store holds train features of."""
    feature_set = FeatureStore.open(str(store)).open_set("train")
    missing = set(feature_set.missing_blocks())
    for block in set(range(feature_set.info.num_blocks)) - missing:
        yield from feature_set.read_examples(["example_id"], block=block)["example_id"].to_pylist()


def test_a_model_without_a_supported_layer_is_refused_by_what_it_has(tmp_path: Path) -> None:
    message = refused(write_own_run(tmp_path, model="without a layer"), code=2)

    assert "features.groups: no parameter group is left. The model has no supported layer" in message
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_a_nan_loss_names_the_example_and_its_block_is_not_committed(tmp_path: Path) -> None:
    message = refused(write_own_run(tmp_path, broken=[20]), code=3)

    assert "row-20: its loss is nan" in message
    assert "features.max_invalid allows 0 of the set" in message
    assert "row-20" not in [*committed(tmp_path / "store")]


@pytest.mark.slow
def test_nan_losses_of_the_first_rows_are_refused_before_there_is_a_store(tmp_path: Path) -> None:
    message = refused(write_own_run(tmp_path, broken=[0, 3]), code=3)

    assert "row-0: its loss is nan; row-3: its loss is nan" in message
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
def test_an_empty_document_is_dropped_and_counted_and_is_in_no_set(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    texts = (tiny_run / "texts.jsonl").read_text(encoding="utf-8")
    empty = json.dumps({"id": "nothing", "topic": "sport", "text": " \n "})
    (tmp_path / "texts.jsonl").write_text(f"{empty}\n{texts}", encoding="utf-8")
    one_worker: dict[str, dict[str, Any]] = {"cluster": {"workers": 1}, "data": {"id": "id"}}

    done = gradstore("featurize", make_run(tmp_path, str(tmp_path / "store"), one_worker))

    assert done.returncode == 0, done.stderr
    assert "dropped: 1 empty" in done.stderr
    assert "nothing" not in [*committed(tmp_path / "store")]
    short = make_run(tmp_path, str(tmp_path / "other"), {**one_worker, "data.eval": {"rows": 31}})
    assert "rows [60, 91) are declared, but there are 90: 91 documents read" in refused(short, code=3)
    assert not (tmp_path / "other").exists()


def test_an_unknown_group_rule_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    run = write_own_run(tmp_path)
    run.write_text(f"{run.read_text(encoding='utf-8')}[features.groups]\nrule = 'layer'\n", encoding="utf-8")

    assert "features.groups.rule: found 'layer'; accepted: tensor, module, block," in refused(run, code=2)
    assert not (tmp_path / "store").exists()


def test_an_image_without_a_label_is_named(tmp_path: Path) -> None:
    images, numbers = draw(60)
    labels: list[object] = [CLASSES[number] for number in numbers]
    labels[7] = None
    write_parquet(tmp_path / "images.parquet", [encode(pixels) for pixels in images], labels)
    model = {"adapter": "image_classifier", "source": f"{MODULE}:convolutions", "precision": "float32"}
    data = {"source": "images.parquet", "format": "parquet", "label": "label"}

    message = refused(write_run(tmp_path, {"model": model, "data": data}), code=3)

    assert "images.parquet:7" in message
    assert "label" in message
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"learn": {"k": 0}}, 2, "learn.k: found 0; accepted: a number of at least 1, or a list of different ones."),
        ({"learn": {"k": [3, 49]}}, 2, "learn.k: found 49; accepted: at most the 48 rows of data.train."),
        ({"data.learn": {"rows": 0}}, 2, "data.learn.rows: found 0; accepted:"),
        ({"data.learn": {"source": "nothing.jsonl"}}, 3, "nothing.jsonl"),
        ({"data.eval": {"start": 50}}, 2, "rows [50, 62) of texts.jsonl overlap rows [48, 60) of data.learn"),
        ({"learn": {"objective": "pairs"}}, 2, "learn.pairs: is missing"),
        ({"learn": {"objective": "pairs", "pairs": "pairs.csv"}}, 2, "pairs.csv; there is no such file."),
    ],
    ids=[
        "k of 0",
        "k above N",
        "no learn rows",
        "no learn document",
        "learn and eval overlap",
        "no pairs",
        "no pair file",
    ],
)
def test_what_weights_cannot_be_learned_from_is_refused_before_there_is_a_store(
    tiny_run: Path, tmp_path: Path, changes: dict[str, dict[str, Any]], code: int, message: str
) -> None:
    (tmp_path / "model").symlink_to(tiny_run / "model")
    (tmp_path / "texts.jsonl").symlink_to(tiny_run / "texts.jsonl")
    (tmp_path / "nothing.jsonl").touch()
    relative = {"model": {"source": "model"}, "data": {"source": "texts.jsonl"}}

    run = make_run(tmp_path, str(tmp_path / "store"), {**relative, **changes})

    found = gradstore("run", run, "--quiet", cwd=tmp_path)
    assert found.returncode == code, found.stderr
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "store").exists()
