"""Models that use their layers in unusual ways get the right features, or an error that names the layer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradstore.adapters.models.optimizer import read_divisors
from gradstore.errors import DataError, SpecError
from gradstore.groups import Grouping, ModelParameters, Parameter, partition
from gradstore.numerics.gradients import FeatureExtractor, model_parameters
from gradstore.numerics.projection import Identity, Logra, Projection, SecondMoments
from gradstore.stages.featurize.prepare import refuse_inexact
from tests.networks import EVERYTHING, Perceptron, classifier_case, randomised

VALUES = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(0))


def extractor_of(
    model: nn.Module, projection: Projection | None = None, grouping: Grouping = EVERYTHING
) -> FeatureExtractor:
    groups = partition(model_parameters(model), grouping).groups
    return FeatureExtractor(model.eval(), groups, projection or Identity(), seed=0)


class Tied(nn.Module):
    """An embedding whose weight is read as the head's, outside of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6)
        self.hidden = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = functional.linear(torch.tanh(self.hidden(self.tokens(tokens))), self.tokens.weight)
        return result


def test_autograd_tells_of_a_weight_that_is_read_outside_of_its_layer() -> None:
    model, tokens = randomised(Tied()), torch.tensor([[1, 2, 3]])
    extractor = extractor_of(model)

    def output() -> Tensor:
        result: Tensor = model(tokens).square().sum((1, 2))
        return result

    seen, exact = extractor(output, examples=1).features, extractor.by_autograd(output)

    torch.testing.assert_close(seen["hidden"], exact["hidden"])
    assert (seen["tokens"] - exact["tokens"]).norm() > 0.1 * exact["tokens"].norm()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_featurize_refuses_a_model_whose_features_are_not_autograds() -> None:
    model, tokens = randomised(Tied()), torch.tensor([[1, 2, 3]])
    extractor = extractor_of(model)
    loaded = SimpleNamespace(
        model=model,
        extractor=extractor,
        outputs=lambda model, examples, exactly: model(tokens).square().sum((1, 2)),
    )
    example = SimpleNamespace(example_id="first")

    with pytest.raises(
        DataError, match=r"^tokens: the features of first differ from the gradient that autograd computes by"
    ):
        refuse_inexact(loaded, [example])  # type: ignore[arg-type, list-item]


def test_autograd_gives_the_features_of_a_model_whose_layers_are_seen() -> None:
    case = classifier_case(Perceptron())
    extractor = FeatureExtractor(case.model, case.groups, Logra(rank=3), seed=0)

    seen, exact = (
        extractor(lambda: case.outputs(case.model, [1]), examples=1).features,
        extractor.by_autograd(lambda: case.outputs(case.model, [1])),
    )

    for name, features in exact.items():
        torch.testing.assert_close(seen[name], features)


class Headed(nn.Module):
    """Attention by its names, which writes into what it gave to its last layer."""

    def __init__(self, *, queries: int, careless: bool) -> None:
        super().__init__()
        self.head_dim = 3
        self.q_proj = nn.Linear(6, queries, bias=False)
        self.o_proj = nn.Linear(6, 6, bias=False)
        self.careless = careless

    def forward(self, values: Tensor) -> Tensor:
        hidden = self.q_proj(values)[..., :6].contiguous()
        result: Tensor = self.o_proj(hidden)
        if self.careless:
            hidden += 1
        return result


def test_writing_into_columns_of_an_input_is_refused() -> None:
    extractor = extractor_of(nn.Sequential(Headed(queries=6, careless=True)), Logra(rank=3), Grouping(rule="head"))

    with pytest.raises(SpecError, match=r"0.o_proj.weight: its input is changed in place after the call"):
        extractor(lambda: extractor._model(VALUES).square().sum((1, 2)), examples=4)


def test_heads_are_not_guessed_at_where_queries_are_wider_than_outputs() -> None:
    parameters = model_parameters(nn.Sequential(Headed(queries=12, careless=False)))

    assert not parameters.attention
    with pytest.raises(SpecError, match=r'rule = "head": the model has no attention whose heads are known'):
        partition(parameters, Grouping(rule="head"))


class Mixes(nn.Module):
    """A layer of no known kind that gives each example what belongs to another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self, values: Tensor) -> Tensor:
        return (values @ self.weight).flip(0)


class Counts(Mixes):
    """The same, which expects four rows."""

    def forward(self, values: Tensor) -> Tensor:
        return torch.cat([part @ self.weight for part in torch.split(values, [1, 3])])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Mixes, "0: for single examples it returns other values than for all at once, so it mixes them"),
        (Counts, "0: it does not run for one example of the batch alone: split_with_sizes .* features.groups.exclude"),
    ],
)
def test_a_layer_that_does_not_take_examples_one_by_one_is_named(layer: type[nn.Module], message: str) -> None:
    model = randomised(nn.Sequential(layer(), nn.Linear(6, 2)))
    extractor = extractor_of(model)

    with pytest.raises(DataError, match=message):
        extractor(lambda: model(VALUES).square().sum((1, 2)), examples=4)


class Once(nn.Module):
    """A layer that is called once for all examples, by a model that counts on that."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, values: Tensor) -> Tensor:
        result: Tensor = self.head(values @ self.shared(torch.ones(1, 6, 6)).view(6, 6))
        return result


def test_a_model_that_fails_where_what_is_shared_is_given_to_each_names_the_layer() -> None:
    model = randomised(Once())
    extractor = extractor_of(model)

    with pytest.raises(
        DataError, match=r"shared: called once for all examples, and the model fails .* invalid for input"
    ):
        extractor(lambda: model(VALUES).square().sum((1, 2)), examples=4)


def test_a_square_weight_that_is_tied_to_its_transpose_is_listed() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Linear(6, 6), Conv1D(6, 6))
    model[1].weight = model[0].weight

    assert "uses it transposed" in model_parameters(model).unsupported["0.weight"]


def test_a_model_whose_trained_parameters_have_no_rule_is_told_why() -> None:
    frozen = Parameter(
        name="a.weight", module="a", kind="Linear", category="matrix", out_features=2, in_features=2, frozen=True
    )
    model = ModelParameters(supported=[frozen], unsupported={"b": "held by a list"}, sizes={"a.weight": 4, "b": 4})

    with pytest.raises(SpecError, match=r"1 frozen in the model; 1 held by a list"):
        partition(model, Grouping())


def test_a_part_that_no_output_depends_on_has_unit_vectors_as_components() -> None:
    model, moments = randomised(Once()), SecondMoments()
    extractor = extractor_of(model, moments, Grouping())

    def output() -> Tensor:
        model.get_submodule("shared")(VALUES)
        return model.get_submodule("head")(VALUES).square().sum((1, 2))  # type: ignore[no-any-return]

    extractor(output, examples=4)

    left, right = moments.components({"shared.weight[0:6,0:6]": (2, 3), "head.weight[0:2,0:6]": (2, 2)})[
        "shared.weight[0:6,0:6]"
    ]
    assert torch.equal(left, torch.eye(2, 6))
    assert torch.equal(right, torch.eye(3, 6))


def test_the_direction_of_amsgrad_has_the_largest_second_moment(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.Adam(model.named_parameters(), amsgrad=True, betas=(0.9, 0.5))
    for size in (3.0, 0.1):
        optimizer.zero_grad()
        (size * model(torch.ones(1, 2)).sum()).backward()
        optimizer.step()
    file = str(tmp_path / "optimizer.pt")
    torch.save(optimizer.state_dict(), file)

    found = read_divisors(file, model)["0.weight"]

    largest = optimizer.state_dict()["state"][0]["max_exp_avg_sq"]
    torch.testing.assert_close(found, torch.sqrt(largest / (1 - 0.5**2)) + 1e-8)
