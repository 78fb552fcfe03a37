"""Metrics on cases small enough to compute by hand, tail-patch against a stepped copy of the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradstore.errors import DataError, SpecError
from gradstore.numerics.metrics import (
    chance_precision,
    mean_interval,
    precision_at_k,
    tail_patch,
)
from tests import oracle
from tests.networks import language_model, language_outputs, sequences, weights_of

TOKENS, MASK = sequences([8, 5, 10, 3])


def outputs(model: nn.Module, rows: Sequence[int]) -> Tensor:
    chosen = list(rows)
    return language_outputs(model, TOKENS[chosen], MASK[chosen])


def optimizer(kind: str, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=rate)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def test_precision_is_the_share_of_the_first_k_with_the_querys_label() -> None:
    ranked = ["sport", None, "sport", "tech", "sport"]

    assert precision_at_k(ranked, "sport", k=1) == 1
    assert precision_at_k(ranked, "sport", k=4) == 0.5
    assert precision_at_k(ranked, "politics", k=5) == 0


@pytest.mark.parametrize("k", [0, 3])
def test_precision_beyond_what_is_ranked_is_refused(k: int) -> None:
    with pytest.raises(SpecError, match=f"precision at {k}: only 2 proponents are ranked"):
        precision_at_k(["a", "b"], "a", k=k)


def test_chance_precision_is_what_a_random_ranking_has() -> None:
    train = ["a"] * 6 + ["b"] * 3 + [None]

    assert chance_precision(train, ["a", "b", "b", "c"]) == pytest.approx((0.6 + 0.3 + 0.3 + 0) / 4)
    with pytest.raises(DataError, match="0 queries among 10 training examples"):
        chance_precision(train, [])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tail_patch_is_the_change_that_a_copy_of_the_model_shows(name: str, kind: str) -> None:
    model, rate = language_model(name), 1e-3

    found = tail_patch(model, outputs, 0, [1, 2, 3], optimizer=kind, learning_rate=rate)

    expected = oracle.tail_patch(
        model,
        lambda copied, rows: outputs(copied, [int(str(row)) for row in rows]),
        0,
        [1, 2, 3],
        lambda parameters: optimizer(kind, parameters, rate),
    )
    assert found == pytest.approx(expected, rel=1e-3)
    assert abs(expected) > 0.01


def test_an_autocast_of_the_caller_sees_the_stepped_weights() -> None:
    def autocast_outputs(model: nn.Module, rows: Sequence[int]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return outputs(model, rows)

    inside = tail_patch(language_model("llama"), autocast_outputs, 0, [1], optimizer="sgd", learning_rate=0.01)

    with torch.autocast("cpu", torch.bfloat16):
        around = tail_patch(language_model("llama"), outputs, 0, [1], optimizer="sgd", learning_rate=0.01)
    assert around == inside != 0


def test_training_on_the_query_itself_raises_its_log_probability() -> None:
    assert tail_patch(language_model("llama"), outputs, 0, [0], optimizer="adamw", learning_rate=1e-4) > 0


@pytest.mark.parametrize("fails", [False, True], ids=["after success", "after an error"])
def test_tail_patch_leaves_the_model_bit_for_bit_as_it_was(fails: bool) -> None:
    model = language_model("gpt2")
    first, second, *_ = model.parameters()
    first.requires_grad_(False)
    second.grad = torch.ones_like(second)
    before, kept = weights_of(model), second.grad
    calls = 0

    def counted(model: nn.Module, rows: Sequence[int]) -> Tensor:
        nonlocal calls
        calls += 1
        if fails and calls == 3:
            raise RuntimeError("killed after the step")
        return outputs(model, rows)

    if fails:
        with pytest.raises(RuntimeError, match="killed after the step"):
            tail_patch(model, counted, 0, [1, 2], optimizer="adamw", learning_rate=0.1)
    else:
        tail_patch(model, counted, 0, [1, 2], optimizer="adamw", learning_rate=0.1)

    assert calls == 3
    assert weights_of(model) == before
    assert not first.requires_grad
    assert second.grad is kept
    assert all(parameter.requires_grad for parameter in model.parameters() if parameter is not first)


def test_tail_patch_refuses_what_has_no_value() -> None:
    model = language_model("gpt2")

    with pytest.raises(SpecError, match="optimizer: found 'lion'; accepted: adamw, sgd"):
        tail_patch(model, outputs, 0, [1], optimizer="lion", learning_rate=0.1)
    with pytest.raises(DataError, match=r"no proponents"):
        tail_patch(model, outputs, 0, [], optimizer="sgd", learning_rate=0.1)
    with pytest.raises(DataError, match=r"relative change has no value. Lower the learning rate"):
        tail_patch(model, outputs, 0, [1], optimizer="sgd", learning_rate=float("inf"))


def test_the_interval_of_a_mean_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(0).standard_normal(400) + 3

    mean, low, high = mean_interval(values.tolist(), seed=0)

    assert mean == pytest.approx(values.mean())
    error = values.std() / 20
    assert (mean - low) / error == pytest.approx(1.96, abs=0.2)
    assert (high - mean) / error == pytest.approx(1.96, abs=0.2)
    assert mean_interval(values.tolist(), seed=0) == (mean, low, high)


def test_the_interval_of_one_value_is_that_value_and_of_none_is_refused() -> None:
    assert mean_interval([2.0], seed=0) == (2, 2, 2)
    with pytest.raises(DataError, match="found 0 values"):
        mean_interval([], seed=0)
