"""Training on some examples: against a plain loop, the same by a seed, and what is refused; trainers by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradstore.adapters.training import resolve_trainer
from gradstore.errors import DataError, SpecError
from gradstore.numerics.generator import derive_key, permutation, words
from gradstore.numerics.training import TrainingSettings, train
from gradstore.plan.resolve import make_adapter
from gradstore.spec import read_spec
from tests.runs import make_run

X = torch.from_numpy(np.random.default_rng(0).standard_normal((20, 5))).float()
Y = (X @ torch.arange(5.0))[:, None]


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def losses(model: nn.Module, rows: Sequence[int]) -> Tensor:
    chosen = list(rows)
    squares: Tensor = (model(X[chosen]) - Y[chosen]).square().sum(1)
    return squares


def trained(seed: int = 0, **settings: Any) -> nn.Module:
    model = network()
    train(model, losses, range(20), TrainingSettings(**{"epochs": 3, "batch": 6, **settings}), seed=seed)
    return model


def values(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_it_is_a_plain_loop_over_batches_in_orders_of_the_seed(optimizer: str, schedule: str) -> None:
    found = trained(optimizer=optimizer, schedule=schedule, learning_rate=0.01, weight_decay=0.1)

    model = network()
    plain: torch.optim.Optimizer
    if optimizer == "sgd":
        plain = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    else:
        plain = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    step = 0
    with torch.random.fork_rng():
        torch.manual_seed(derive_key(0, "training", "random") % 2**63)
        for epoch in range(3):
            order = permutation(words(derive_key(0, "training", f"epoch {epoch}"), 20)).tolist()
            # The last two of twenty are dropped.
            for first in (0, 6, 12):
                share = {"constant": 1.0, "linear": 1 - step / 9, "cosine": 0.5 + 0.5 * np.cos(np.pi * step / 9)}[
                    schedule
                ]
                plain.param_groups[0]["lr"] = 0.01 * share
                plain.zero_grad()
                losses(model, order[first : first + 6]).mean().backward()  # type: ignore[no-untyped-call]
                plain.step()
                step += 1
    torch.testing.assert_close(values(found), values(model))
    assert not found.training


def test_a_seed_gives_the_same_model_and_another_seed_another_and_torchs_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, other = (values(trained(seed)) for seed in (0, 0, 1))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_fewer_examples_than_a_batch_are_one_batch_and_losses_fall() -> None:
    model = network()
    before = losses(model.eval(), range(4)).mean().item()
    train(model, losses, range(4), TrainingSettings(epochs=40, batch=64, learning_rate=0.02), seed=0)

    assert losses(model, range(4)).mean().item() < before / 2


def test_no_examples_and_losses_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="found no examples to train on"):
        train(network(), losses, [], TrainingSettings(), seed=0)
    with pytest.raises(DataError, match=r"the loss is (nan|inf) in epoch \d+\. Lower the learning rate"):
        trained(optimizer="sgd", learning_rate=1e6, epochs=30)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("adam", {}, r"training\.trainer: found 'adam'; accepted: scratch, fine_tune, airrep of"),
        ("scratch", {"steps": 3}, r"training\.options\.steps: unknown key; accepted for scratch: epochs, batch"),
        ("scratch", {"epochs": "3"}, r"training\.options\.epochs: found '3'; accepted"),
        ("scratch", {"schedule": "step"}, r"training\.options\.schedule: found 'step'; accepted: 'constant'"),
        ("no_such_module:train", {}, r"training\.trainer: .*Python finds no module 'no_such_module'"),
    ],
)
def test_what_is_no_trainer_is_refused_by_its_key(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        resolve_trainer(name, options)


def test_a_trainer_of_ones_own_is_called_with_its_options_and_must_return_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_trainers.py").write_text(
        "from torch import nn\n"
        "def good(adapter, examples, *, seed, device, width): return nn.Linear(len(examples), width).train()\n"
        "def bad(adapter, examples, *, seed, device): return 3\n"
        "def ugly(adapter, examples, *, seed, device): raise RuntimeError('no room')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    examples: Any = [None] * 4
    adapter: Any = None

    model = resolve_trainer("own_trainers:good", {"width": 7})(adapter, examples, seed=0, device="cpu")
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features, model.training) == (4, 7, False)
    with pytest.raises(SpecError, match=r"own_trainers:bad returned int; it must return a torch\.nn\.Module"):
        resolve_trainer("own_trainers:bad", {})(adapter, examples, seed=0, device="cpu")
    with pytest.raises(
        SpecError, match=r"own_trainers:ugly of 4 examples failed: RuntimeError: no room \(own_trainers"
    ):
        resolve_trainer("own_trainers:ugly", {})(adapter, examples, seed=0, device="cpu")
    sys.modules.pop("own_trainers")


def test_a_language_model_is_made_anew_and_learns_the_examples(tmp_path: Path) -> None:
    spec = read_spec(make_run(tmp_path, str(tmp_path / "store")))
    adapter = make_adapter(spec)
    examples = adapter.examples().splits["train"][:24]
    trainer = resolve_trainer("scratch", {"epochs": 20, "batch": 12, "learning_rate": 0.01})

    model, again = (trainer(adapter, examples, seed=5, device="cpu") for _ in range(2))

    fresh, other = (adapter.fresh(seed, "cpu") for seed in (5, 6))  # type: ignore[attr-defined]
    assert torch.equal(values(model), values(again))
    assert not torch.equal(values(fresh), values(other))
    with torch.no_grad():
        before, after = (float(adapter.outputs(item.eval(), examples).sum()) for item in (fresh, model))
        sizes = torch.tensor([example.size - 1 for example in examples])
        means = adapter.losses(fresh, examples)  # type: ignore[attr-defined]
        torch.testing.assert_close(means, adapter.outputs(fresh, examples) / sizes)
    assert after < 0.8 * before


def test_an_adapter_that_makes_no_model_anew_is_told_to_the_user(tmp_path: Path) -> None:
    trainer = resolve_trainer("scratch", {})
    adapter: Any = object()
    with pytest.raises(
        SpecError, match=r"training\.trainer: found \'scratch\', and object does not say how its model is made anew"
    ):
        trainer(adapter, [], seed=0, device="cpu")
