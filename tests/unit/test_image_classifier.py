"""The image classifier: models of any origin, and three splits of labelled images."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.adapters import ADAPTERS, Adapter
from gradstore.errors import DataError, SpecError
from gradstore.store.examples import Example, from_table, to_table
from tests import oracle
from tests.classifiers import SPLITS, classifier, networks
from tests.pictures import CLASSES, draw, encode, write_folder, write_npz, write_parquet


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with networks(tmp_path_factory.mktemp("nets")) as name:
        yield name


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_npz(tmp_path / "a.npz", *draw(15))


def test_the_adapter_is_made_by_its_name_and_travels_to_workers(module: str, archive: Path) -> None:
    ours = classifier(f"{module}:make", archive)

    adapter: Adapter = ADAPTERS["image_classifier"](ours.model, ours.data, ours.seed)

    assert pickle.loads(pickle.dumps(adapter)) == ours


def test_examples_are_the_images_as_bytes_and_their_classes(module: str, archive: Path) -> None:
    images, classes = draw(15)

    examples = classifier(f"{module}:make", archive).examples()

    assert {name: len(found) for name, found in examples.splits.items()} == {"train": 6, "learn": 3, "eval": 3}
    every = [example for found in examples.splits.values() for example in found]
    assert len({example.example_id for example in every}) == 12
    for example in every:
        row = int(example.example_id.removeprefix("a.npz:"))
        np.testing.assert_array_equal(example.inputs["image"], images[row].transpose(2, 0, 1))
        assert example.inputs["class"] == classes[row]
        assert (example.label, example.text, example.source) == (str(classes[row]), "", str(archive))
        assert example.size == 1
    (facts,) = examples.facts.sources
    assert facts.describe() == f"12 images read from {archive}; dropped: none"


def test_examples_survive_the_store(module: str, archive: Path) -> None:
    examples = list(classifier(f"{module}:make", archive).examples().splits["train"])

    found = from_table(to_table(examples, 0))

    for ours, stored in zip(examples, found, strict=True):
        assert (ours.example_id, ours.label, ours.size) == (stored.example_id, stored.label, stored.size)
        for name, values in ours.inputs.items():
            np.testing.assert_array_equal(values, stored.inputs[name])
            assert stored.inputs[name].dtype == values.dtype
            assert stored.inputs[name].shape == values.shape


def test_the_order_is_the_seeds_or_the_sources_own(module: str, archive: Path) -> None:
    def ids(**options: Any) -> list[str]:
        seed = options.pop("seed", 0)
        found = classifier(f"{module}:make", archive, seed=seed, splits={**SPLITS, **options}).examples()
        return [example.example_id for split in found.splits.values() for example in split]

    assert ids(shuffle=False) == [f"a.npz:{row}" for row in range(12)]
    assert ids() == ids()
    assert ids() != ids(seed=1)
    assert sorted(ids()) != sorted(ids(shuffle=False))


def test_equal_images_are_one_example_whatever_their_class(module: str, tmp_path: Path) -> None:
    images, classes = draw(15)
    images[7], images[9], images[4] = images[2], images[2], images[3]
    path = write_npz(tmp_path / "a.npz", images, classes)

    examples = classifier(f"{module}:make", path, splits={**SPLITS, "shuffle": False}).examples()

    ids = [example.example_id for split in examples.splits.values() for example in split]
    assert ids == [f"a.npz:{row}" for row in range(15) if row not in (4, 7, 9)]
    assert examples.facts.sources[0].duplicates == 3
    with pytest.raises(
        DataError, match=r"a\.npz:7 of .* has the pixels of a\.npz:2 .* in data\.train; there are 2 such"
    ):
        classifier(f"{module}:make", path, splits={**SPLITS, "shuffle": False, "deduplicate": False}).examples()


def test_an_image_in_two_sources_is_found(module: str, tmp_path: Path) -> None:
    images, classes = draw(12)
    first = write_npz(tmp_path / "a.npz", images[:9], classes[:9])
    folder = write_folder(tmp_path / "pictures", images[8:], classes[8:])
    splits = {"train": {"rows": 6}, "learn": {"rows": 3}, "eval": {"source": str(folder)}}

    with pytest.raises(DataError, match=r"take them out of one of the sources"):
        classifier(f"{module}:make", first, splits=splits, options={"classes": list(CLASSES)}).examples()


def test_names_are_numbered_in_their_order_in_every_split(module: str, tmp_path: Path) -> None:
    images, classes = draw(12)
    folder = write_folder(tmp_path / "pictures", images, classes)
    adapter = classifier(f"{module}:make", folder)

    examples = adapter.examples()

    assert adapter.identity()["classes"] == ["bird", "cat", "dog"]
    for split in examples.splits.values():
        for example in split:
            assert example.label == CLASSES[int(example.inputs["class"])]
            assert example.label == example.example_id.split("/")[0]


def test_the_order_may_be_declared_or_that_of_the_table(module: str, tmp_path: Path) -> None:
    images, classes = draw(12)
    order = ["dog", "bird", "cat"]
    table = write_parquet(
        tmp_path / "a.parquet",
        [encode(pixels) for pixels in images],
        [order.index(CLASSES[n]) for n in classes],
        names=order,
    )

    written = classifier(f"{module}:make", table)
    declared = classifier(f"{module}:make", table, options={"classes": list(CLASSES)})

    assert written.identity()["classes"] == order
    assert declared.identity()["classes"] == list(CLASSES)
    for adapter in (written, declared):
        names = adapter.identity()["classes"]
        for example in adapter.examples().splits["train"]:
            row = int(example.example_id.split(":")[1])
            assert example.label == CLASSES[classes[row]] == names[int(example.inputs["class"])]


@pytest.mark.parametrize("output", ["cross_entropy", "margin"])
def test_an_output_is_the_oracles_and_does_not_depend_on_batch_mates(output: str, module: str, archive: Path) -> None:
    adapter = classifier(
        f"{module}:make", archive, output=output, options={"mean": [0.4, 0.5, 0.6], "std": 0.25, "size": 9}
    )
    model = adapter.load("cpu").double()
    examples = list(adapter.examples().splits["train"])

    with torch.no_grad():
        found = adapter.outputs(model, examples)
        alone = torch.cat([adapter.outputs(model, [example]) for example in examples])
        logits = []
        for example in examples:
            image = torch.from_numpy(example.inputs["image"]).double() / 255
            mean = torch.tensor([0.4, 0.5, 0.6]).double().view(3, 1, 1)
            logits.append(model(((image - mean) / 0.25)[None])[0].numpy())

    p = np.array(
        [oracle.class_probability(row, int(e.inputs["class"])) for row, e in zip(logits, examples, strict=True)]
    )
    expected = -np.log(p) if output == "cross_entropy" else np.log(p / (1 - p))
    assert examples[0].inputs["image"].shape == (3, 9, 9)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    torch.testing.assert_close(found, alone)
    assert adapter.identity()["output"] == output


def test_a_model_is_in_evaluation_mode_in_float32_and_without_dropout(module: str, archive: Path) -> None:
    adapter = classifier(f"{module}:Nets.large", archive)

    model, shape = adapter.load("cpu"), adapter.load("meta")

    assert not any(part.training for part in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert [part.p for part in model.modules() if isinstance(part, torch.nn.Dropout2d)] == [0.0]
    assert all(parameter.is_meta for parameter in shape.parameters())
    assert [name for name, _ in shape.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert adapter.output_heads(model) == ()


def test_shapes_alone_tell_what_the_model_puts_out(module: str, archive: Path) -> None:
    adapter = classifier(f"{module}:make", archive, output="margin")

    found = adapter.outputs(adapter.load("meta"), adapter.examples().splits["train"][:2])

    assert found.shape == (2,)
    assert found.is_meta


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_come_from_a_file_of_tensors(suffix: str, module: str, archive: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state = {
        name: torch.full_like(value, 0.5) if value.is_floating_point() else value
        for name, value in classifier(f"{module}:make", archive).load("cpu").state_dict().items()
    }
    path = tmp_path / f"net{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)

    model = classifier(f"{module}:make", archive, weights=str(path)).load("cpu")

    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name])


@pytest.fixture(scope="module")
def transformers_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForImageClassification, ResNetConfig

    folder = tmp_path_factory.mktemp("resnet")
    config = ResNetConfig(
        num_channels=3,
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        downsample_in_first_stage=True,
        id2label={0: "dog", 1: "bird", 2: "cat"},
        label2id={"dog": 0, "bird": 1, "cat": 2},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    return folder


def test_a_model_of_transformers_classifies_in_its_own_order(transformers_model: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "pictures", *draw(12, (32, 32, 3)))
    adapter = classifier(str(transformers_model), folder)

    model, shape = adapter.load("cpu"), adapter.load("meta")
    examples = list(adapter.examples().splits["eval"])

    assert adapter.identity()["classes"] == ["dog", "bird", "cat"]
    assert all(parameter.is_meta for parameter in shape.parameters())
    assert [example.label for example in examples] == [e.example_id.split("/")[0] for e in examples]
    pixels = torch.from_numpy(np.stack([example.inputs["image"] for example in examples])).float() / 255
    with torch.no_grad():
        logits = model(pixels).logits
        found = adapter.outputs(model, examples)
    places = [["dog", "bird", "cat"].index(str(example.label)) for example in examples]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(places), reduction="none")
    torch.testing.assert_close(found, expected)


def test_a_model_of_transformers_takes_weights_of_its_checkpoints(
    transformers_model: Path, archive: Path, tmp_path: Path
) -> None:
    state = classifier(str(transformers_model), archive).load("cpu").state_dict()
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "epoch-1.pt")

    model = classifier(str(transformers_model), archive, weights=str(tmp_path / "epoch-1.pt")).load("cpu")

    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name] + 1)


def test_a_folder_without_a_classifier_is_refused(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()

    with pytest.raises(
        SpecError, match=r"does not load as an image classifier: .*\n.*function \(package\.module:function\)"
    ):
        classifier(str(tmp_path / "model"), archive).load("cpu")


def test_identity_names_what_features_depend_on(module: str, archive: Path) -> None:
    found = classifier(f"{module}:make", archive, options={"mean": 0.5, "size": 9}).identity()
    other = classifier(
        f"{module}:make", archive, options={"mean": 0.5, "size": 9, "arguments": {"channels": 3}}
    ).identity()

    assert found["preprocessing"] == {"mean": [0.5], "std": [1.0], "size": [9, 9], "channels": None}
    assert found["classes"] is None
    assert found["architecture"]["source"] == f"{module}:make"
    assert found["architecture"] != other["architecture"]


def test_one_token_stands_for_64_pixels(module: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", *draw(12, (28, 28)))

    examples: list[Example] = list(
        classifier(f"{module}:make", path, options={"arguments": {"channels": 1}}).examples().splits["train"]
    )

    assert {example.size for example in examples} == {12}
