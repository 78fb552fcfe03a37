"""Training of an encoder: what is planted is found, a training taken up again goes on as it would have, refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from gradstore.adapters.encoder import TextEncoder
from gradstore.errors import DataError, SpecError
from gradstore.numerics.representation import AttentionPools
from gradstore.numerics.representation.fitting import Fitting, FittingSettings, Lesson
from gradstore.numerics.representation.model import Representation, padded
from gradstore.spec import DataSection, ModelSection
from gradstore.stages.train_encoder import _Checkpoint
from tests.encoders import CONTEXT, LAYERS, WIDTH, make_tiny_encoder

EXAMPLES, QUERIES, SUBSETS = 40, 80, 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def encoder(folder: Path, device: str = "cpu") -> Representation:
    splits = {"train": {"rows": 3}, "learn": {"rows": 1}, "eval": {"rows": 1}}
    data = DataSection.model_validate({"source": "nowhere", "length": CONTEXT, **splits})
    return cast(
        Representation, TextEncoder(ModelSection(adapter="text_encoder", source=str(folder)), data, 0).load(device)
    )


def represented(model: Representation, texts: Any) -> np.ndarray:
    """Enc of some texts, one at a time."""
    with torch.no_grad():
        found = [model.representations(*padded([text], torch.device("cpu")))[str(LAYERS)][0] for text in texts]
    return torch.stack(found).double().numpy()


def lesson(folder: Path, *, noise: float = 0.0) -> Lesson:
    """Texts of random tokens, and outcomes that another linear layer on the encoder's states would have predicted."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 300, rng.integers(4, 12)) for _ in range(EXAMPLES + QUERIES)]
    subsets = np.stack([rng.permutation(EXAMPLES)[:6] for _ in range(SUBSETS)])
    states = represented(encoder(folder), texts) @ rng.normal(0, 1, (WIDTH, 3))
    masks = np.zeros((SUBSETS, EXAMPLES), bool)
    np.put_along_axis(masks, subsets, True, axis=1)
    pools = AttentionPools(masks, QUERIES)
    pools.add(states[EXAMPLES:] @ states[:EXAMPLES].T, np.arange(EXAMPLES))
    outcomes = pools.total()
    return Lesson(
        texts=texts, subsets=subsets, outcomes=outcomes + noise * outcomes.std() * rng.normal(size=outcomes.shape)
    )


SETTINGS = FittingSettings(epochs=10, patience=10, queries=16, subsets=24, learning_rate=0.05, sharpness=2.0)


@pytest.mark.parametrize(("layers", "learning_rate"), [(0, 0.05), (1, 0.1)])
def test_held_out_subsets_are_ranked_better_the_longer_it_trains(
    folder: Path, layers: int, learning_rate: float
) -> None:
    settings = replace(SETTINGS, layers=layers, learning_rate=learning_rate)
    fitting = Fitting(encoder(folder), lesson(folder), settings, seed=1)
    fitted = fitting.begin()
    for reached in fitting.go_on(fitted):
        fitted = reached

    assert fitted.accuracies[fitted.best] == max(fitted.accuracies)
    assert fitted.accuracies[fitted.best] > fitted.accuracies[0] + 0.2
    assert len(fitted.accuracies) == 1 + settings.epochs
    gains = fitted.gains()
    assert len(gains) == round(settings.held_out * QUERIES)
    assert np.mean(gains) == pytest.approx(fitted.accuracies[fitted.best] - fitted.accuracies[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("layers", [0, 1])
def test_a_training_on_a_gpu_goes_as_on_the_cpu_and_either_goes_on_from_the_others_checkpoint(
    folder: Path, layers: int
) -> None:
    settings = replace(SETTINGS, layers=layers, epochs=3)
    whole, halfway = {}, {}
    for device in ("cpu", "cuda"):
        fitting = Fitting(encoder(folder, device), lesson(folder), settings, seed=1)
        fitted = fitting.begin()
        for reached in fitting.go_on(fitted):
            fitted = reached
            if len(fitted.accuracies) == 2:
                halfway[device] = replace(fitted, accuracies=[*fitted.accuracies], tensors={**fitted.tensors})
        whole[device] = fitted.accuracies

    assert whole["cuda"] == pytest.approx(whole["cpu"], abs=0.01)
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        fitting = Fitting(encoder(folder, device), lesson(folder), settings, seed=1)
        (*_, fitted) = fitting.go_on(halfway[other])
        assert fitted.accuracies == pytest.approx(whole[device], abs=0.01)
        assert next(fitting.best(fitted).parameters()).device.type == device


def test_how_large_the_encoders_states_are_makes_no_difference(folder: Path) -> None:
    found = []
    for size in (1.0, 16.0):
        model = encoder(folder)
        layers: Any = model.encoder.get_submodule("encoder.layer")
        with torch.no_grad():
            for parameter in layers[-1].output.LayerNorm.parameters():
                parameter.mul_(size)
        fitting = Fitting(model, lesson(folder), replace(SETTINGS, epochs=3), seed=1)
        fitted = fitting.begin()
        for reached in fitting.go_on(fitted):
            fitted = reached
        found.append(fitted.accuracies)

    assert found[0][0] != found[0][-1]
    assert found[0] == pytest.approx(found[1], abs=1e-3)


def test_it_begins_with_the_encoders_own_products_at_the_sharpness_that_is_asked_for(folder: Path) -> None:
    ours = lesson(folder)
    model = encoder(folder)
    before = represented(model, ours.texts)
    # Many encoders come with a module that normalises.
    model.reading = replace(model.reading, normalize=True)
    fitting = Fitting(model, ours, SETTINGS, seed=1)

    after = represented(fitting.best(fitting.begin()), ours.texts)

    assert np.square(after).sum(1).mean() == pytest.approx(SETTINGS.sharpness, rel=1e-4)
    assert after == pytest.approx(
        before * np.sqrt(SETTINGS.sharpness / np.square(before).sum(1).mean()), rel=1e-3, abs=1e-4
    )


@pytest.mark.parametrize("layers", [0, 1])
def test_a_training_that_is_taken_up_again_goes_on_as_it_would_have(folder: Path, layers: int) -> None:
    settings = FittingSettings(epochs=4, layers=layers, queries=8, subsets=12, learning_rate=0.02)
    ours = lesson(folder, noise=0.5)
    through = Fitting(encoder(folder), ours, settings, seed=1)
    whole = through.begin()
    for reached in through.go_on(whole):
        whole = reached

    first = Fitting(encoder(folder), ours, settings, seed=1)
    (*_, half) = islice(first.go_on(first.begin()), 2)
    second = Fitting(encoder(folder), ours, settings, seed=1)
    for reached in second.go_on(half):
        half = reached

    assert half.accuracies == whole.accuracies
    assert half.best == whole.best
    assert half.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(half.tensors[name], tensor) for name, tensor in whole.tensors.items())
    texts = ours.texts[:5]
    assert np.array_equal(represented(second.best(half), texts), represented(through.best(whole), texts))


def test_a_checkpoint_holds_all_of_an_epoch_that_is_the_best_too(folder: Path, tmp_path: Path) -> None:
    fitted = Fitting(encoder(folder), lesson(folder), SETTINGS, seed=1).begin()
    checkpoint = _Checkpoint(tmp_path / "encoder", "these settings")

    checkpoint.write(fitted)

    found = checkpoint.read()
    assert found is not None
    assert (found.accuracies, found.best) == (fitted.accuracies, fitted.best)
    assert found.tensors.keys() == fitted.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in fitted.tensors.items())


def test_it_ends_when_nothing_gets_better_and_its_best_is_what_it_was_then(folder: Path) -> None:
    # Outcomes of pure chance: what it learns of some queries says nothing of others.
    rng = np.random.default_rng(1)
    ours = lesson(folder)
    chance = Lesson(texts=ours.texts, subsets=ours.subsets, outcomes=rng.normal(size=ours.outcomes.shape))
    settings = FittingSettings(epochs=200, patience=3, queries=8, subsets=12, learning_rate=0.05)
    fitting = Fitting(encoder(folder), chance, settings, seed=1)
    fitted = fitting.begin()
    for reached in fitting.go_on(fitted):
        fitted = reached

    assert len(fitted.accuracies) == fitted.best + 1 + 3 < 200
    assert fitted.ended(settings)


def test_layers_below_those_that_are_trained_stay_as_they_are(folder: Path) -> None:
    model = encoder(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = FittingSettings(epochs=1, layers=1, queries=8, subsets=12, learning_rate=0.02)
    fitting = Fitting(model, lesson(folder), settings, seed=1)
    for _ in fitting.go_on(fitting.begin()):
        pass

    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("encoder.encoder.layer.1.") for name in changed)


def test_outcomes_that_are_equal_everywhere_are_refused(folder: Path) -> None:
    ours = lesson(folder)
    equal = Lesson(texts=ours.texts, subsets=ours.subsets, outcomes=np.ones_like(ours.outcomes))

    with pytest.raises(
        DataError, match="found no pairs of subsets whose outcomes differ, among 48 subsets and 64 queries"
    ):
        Fitting(encoder(folder), equal, SETTINGS, seed=1)


def test_too_few_queries_to_hold_any_out_are_refused(folder: Path) -> None:
    ours = lesson(folder)
    one = Lesson(texts=ours.texts[: EXAMPLES + 1], subsets=ours.subsets, outcomes=ours.outcomes[:1])

    with pytest.raises(DataError, match="found 1 queries, of which some are held out"):
        Fitting(encoder(folder), one, SETTINGS, seed=1)


def test_more_layers_than_there_are_cannot_be_trained(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"training\.options\.layers: found 3; the encoder has 2"):
        Fitting(encoder(folder), lesson(folder), FittingSettings(layers=3), seed=1)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"epochs": 0}, "epochs: found 0"),
        ({"subsets": 1}, "subsets: found 1"),
        ({"learning_rate": 0.0}, r"learning_rate: found 0\.0"),
        ({"weight_decay": -1.0}, r"weight_decay: found -1\.0"),
        ({"held_out": 1.0}, r"held_out: found 1\.0"),
        ({"layers": -1}, "layers: found -1"),
    ],
)
def test_settings_that_nothing_can_be_trained_with_are_refused(options: dict[str, Any], found: str) -> None:
    with pytest.raises(SpecError, match=rf"training\.options\.{found}"):
        FittingSettings(**options)
