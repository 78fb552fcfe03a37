"""What the image classifier refuses: weights, sources, options and data that cannot be used, each by its name."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.errors import DataError, SpecError
from tests.classifiers import SPLITS, classifier, networks
from tests.pictures import CLASSES, draw, encode, write_folder, write_npz, write_parquet


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with networks(tmp_path_factory.mktemp("nets")) as name:
        yield name


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "a.npz", *draw(15))


def no_file(path: Path, module: str) -> None:
    pass


def cut(path: Path, module: str) -> None:
    path.write_bytes(b"\x00\x01")


EXECUTED = Path(tempfile.gettempdir()) / f"executed-{uuid.uuid4().hex}"


class Code:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return (Path.touch, (EXECUTED,))  # type: ignore[return-value]


def code(path: Path, module: str) -> None:
    torch.save({"weight": Code()}, path)


def checkpoint(path: Path, module: str) -> None:
    torch.save({"epoch": 3, "model": {"weight": torch.zeros(1)}}, path)


def lacking(path: Path, module: str) -> None:
    torch.save({"0.weight": torch.zeros(4, 3, 3, 3)}, path)


def changed(name: str, value: torch.Tensor) -> Callable[[Path, str], None]:
    def save(path: Path, module: str) -> None:
        state = classifier(f"{module}:make", path).load("cpu").state_dict()
        torch.save({**state, name: value}, path)

    return save


@pytest.mark.parametrize(
    ("write", "name", "error", "message"),
    [
        (no_file, "net.pt", SpecError, r"model\.weights: .*net\.pt': there is no such file"),
        (no_file, "net.ckpt", SpecError, r"accepted: a file of tensors, \.safetensors or \.pt, \.pth, \.bin"),
        (cut, "net.pt", DataError, r"net\.pt cannot be read as tensors"),
        (cut, "net.safetensors", DataError, r"net\.safetensors cannot be read as tensors"),
        (code, "net.pt", DataError, r"net\.pt cannot be read as tensors: Weights only load failed"),
        (
            checkpoint,
            "net.pt",
            DataError,
            r"holds epoch, model, not tensors by their names\. Save model\.state_dict\(\)",
        ),
        (lacking, "net.pt", DataError, r"lacks 8 tensors of the model: 0\.bias, 1\.bias"),
        (changed("9.weight", torch.zeros(1)), "net.pt", DataError, r"has 1 tensors that the model has not: 9\.weight"),
        (
            changed("6.weight", torch.zeros(5, 16)),
            "net.pt",
            DataError,
            r"6\.weight of .* is \[5, 16\], the model's \[3, 16\]\. .*model\.options\.arguments",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    *,
    write: Callable[[Path, str], None],
    name: str,
    error: type[Exception],
    message: str,
    module: str,
    archive: Path,
    tmp_path: Path,
) -> None:
    write(tmp_path / name, module)

    with pytest.raises(error, match=message):
        classifier(f"{module}:make", archive, weights=str(tmp_path / name)).load("cpu")

    assert not EXECUTED.exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module_at_all:make", r"finds no module 'no_such_module_at_all'\. .*PYTHONPATH.*neither the working"),
        ("{}.inner:make", r"finds no module '.*\.inner'|is not a package"),
        ("{}:makes", r"has no 'makes'\. It has: make, Nets, fails, number"),
        ("{}:LIMIT", r"is int, not a function"),
        ("{}:number", r"returned int; it must return a torch\.nn\.Module"),
        ("{}:fails", r":fails\(\) failed: KeyError: 'weights' \(.*, line \d+\)\. Mend the function, or its arguments"),
        ("./nowhere", r"model\.source: '\./nowhere': there is no such folder"),
    ],
)
def test_a_source_that_makes_no_classifier_is_refused(source: str, message: str, module: str, archive: Path) -> None:
    with pytest.raises(SpecError, match=message):
        classifier(source.format(module), archive).load("cpu")


def test_a_module_that_lacks_an_import_is_told_from_one_that_is_missing(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needy_nets.py").write_text("import no_such_library_here\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    with pytest.raises(SpecError, match=r"needy_nets imports no_such_library_here, which is not installed"):
        classifier("needy_nets:make", archive).load("cpu")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"output": "loss"}, r"model\.output: found 'loss'; accepted: cross_entropy \(default\), margin"),
        ({"peft": "x"}, r"model\.peft: image_classifier has no such key"),
        (
            {"options": {"crop": 3}},
            r"model\.options\.crop: unknown key; accepted for image_classifier: arguments, mean",
        ),
        ({"options": {"size": [3]}}, r"model\.options\.size: found \[3\]; accepted: one number, or \[height, width\]"),
        ({"options": {"channels": 4}}, r"model\.options\.channels: found 4; accepted: 1 or 3"),
        ({"options": {"std": [1.0, 0.0, 1.0]}}, r"model\.options\.std: .* above 0"),
        ({"options": {"mean": [1.0, 0.0]}}, r"model\.options\.mean: found \[1\.0, 0\.0\]"),
        ({"source": "org/model", "options": {"arguments": {"a": 1}}}, r"'org/model' is no function"),
    ],
)
def test_options_that_mean_nothing_are_refused_when_the_adapter_is_made(
    model: dict[str, Any], message: str, archive: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        classifier(**{"source": "nets:make", "data": archive, **model})


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("make", {"arguments": {"classes": 5}, "classes": list(CLASSES)}, r"has 5 outputs, the data 3 classes: bird"),
        (
            "make",
            {"arguments": {"classes": 2}},
            r"data\.\w+: the label of a\.npz:\d+ is 2, but .* has 2 outputs, numbered",
        ),
        ("make", {"arguments": {"classes": 1}}, r"has 1 output; a classifier needs one for each class"),
        (
            "make",
            {"arguments": {"channels": 1}},
            r"cannot be run on images of \[3, 8, 8\] .*Set model\.options\.channels",
        ),
        (
            "make",
            {"channels": 1, "mean": [0.0, 0.0, 0.0]},
            r"model\.options\.mean: found 3 values, images have 1 channel",
        ),
        ("wrong_shape", {}, r"returns \[1, 3, 6, 6\] for 1 images; a classifier returns one score per class"),
        ("make", {"classes": ["bird", "cat"]}, r"the label of a\.npz:\d+ is 2; classes are numbered from 0 to 1"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused_before_any_work(
    source: str, options: dict[str, Any], message: str, module: str, archive: Path
) -> None:
    with pytest.raises((SpecError, DataError), match=message):
        classifier(f"{module}:{source}", archive, options=options).examples()


def without_labels(folder: Path) -> Path:
    (folder / "pictures").mkdir()
    for row, pixels in enumerate(draw(15)[0]):
        (folder / "pictures" / f"{row:02d}.png").write_bytes(encode(pixels))
    return folder / "pictures"


def two_shapes(folder: Path) -> Path:
    write_folder(folder / "pictures", *draw(14))
    (folder / "pictures" / "dog" / "tall.png").write_bytes(encode(draw(1, (9, 8, 3))[0][0]))
    return folder / "pictures"


def few(folder: Path) -> Path:
    return write_npz(folder / "few.npz", *draw(10))


def mixed(folder: Path) -> Path:
    images, _ = draw(15)
    path = folder / "table"
    path.mkdir()
    files = [encode(pixels) for pixels in images]
    write_parquet(path / "0.parquet", files[:8], [0] * 8)
    write_parquet(path / "1.parquet", files[8:], ["cat"] * 7)
    return path


def equal_ids(folder: Path) -> Path:
    images, classes = draw(15)
    np.savez(folder / "a.npz", image=images, label=classes, name=["x"] * 15)
    return folder / "a.npz"


@pytest.mark.parametrize(
    ("write", "splits", "message"),
    [
        (without_labels, SPLITS, r"data\.train: \d\d\.png has no label\. Give it one"),
        (
            two_shapes,
            {"train": {"rows": 9}, "learn": {"rows": 3}, "eval": {}},
            r"is \[3, 9, 8\] .*Set model\.options\.size",
        ),
        (few, SPLITS, r"data\.eval\.rows: rows \[9, 12\) are declared, but there are 10: 10 images read"),
        (mixed, SPLITS, r"some labels are names \('cat'\) and others numbers \(0\)"),
        (equal_ids, {**SPLITS, "id": "name"}, r"data\.train\.id: 'x' names two images"),
        (
            few,
            {**SPLITS, "learn": {"rows": 3, "image": "other"}},
            r"data\.learn\.image: found 'other', but data\.train",
        ),
    ],
)
def test_data_that_cannot_be_used_as_declared_is_refused(
    write: Callable[[Path], Path], splits: dict[str, Any], message: str, module: str, tmp_path: Path
) -> None:
    with pytest.raises((DataError, SpecError), match=message):
        classifier(f"{module}:make", write(tmp_path), splits=splits).examples()
