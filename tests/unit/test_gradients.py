"""The extractor finds every layer, leaves the model as it was, and refuses what would give wrong features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradstore.errors import DataError, SpecError
from gradstore.groups import Layer, ParameterGroup, partition
from gradstore.numerics.gradients import FeatureExtractor, supported_layers
from gradstore.numerics.projection import Logra
from tests.networks import CASES, Perceptron, Reused, classifier_case, language_case, language_model, weights_of

PROJECTION = Logra(rank=3)


class Mixed(nn.Module):
    """Layers that are not supported, not used, used without gradient, or fed without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(1, 1, 3)
        self.used = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 3)
        self.silent = nn.Linear(6, 3)
        self.single = nn.Linear(6, 3)

    def forward(self, values: Tensor) -> Tensor:
        with torch.no_grad():
            self.silent(values)
        self.single(values[0])
        result: Tensor = self.used(values)
        return result


def groups_of(model: nn.Module, *names: str) -> tuple[ParameterGroup, ...]:
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    groups = partition(supported_layers(model), parameters).groups
    return tuple(group for group in groups if not names or group.name in names)


def extract(model: nn.Module, *names: str, output: Callable[[], Tensor] | None = None) -> dict[str, Tensor]:
    extractor = FeatureExtractor(model.eval(), groups_of(model, *names), PROJECTION, seed=0)
    return extractor(output or (lambda: model(torch.ones(4, 6)).sum(1)))[1]


def test_linear_and_conv1d_layers_are_found_with_canonical_shapes() -> None:
    llama, gpt2 = supported_layers(language_model("llama")), supported_layers(language_model("gpt2"))

    assert len(llama) == 2 * 7 + 1
    assert llama[1] == Layer(name="model.layers.0.self_attn.k_proj", kind="Linear", out_features=16, in_features=32)
    # GPT-2's head shares its weight with the embedding, but no other supported layer has it.
    assert [layer.kind for layer in gpt2] == ["Conv1D"] * 8 + ["Linear"]
    assert gpt2[0] == Layer(name="transformer.h.0.attn.c_attn", kind="Conv1D", out_features=96, in_features=32)


def test_layers_are_found_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = language_model_on_meta()

    assert supported_layers(model) == supported_layers(language_model("gpt2"))


def language_model_on_meta() -> nn.Module:
    from transformers import AutoModelForCausalLM

    from tests.models import tiny_config

    model: nn.Module = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    return model


def test_layers_that_share_a_weight_are_listed_once() -> None:
    assert [layer.name for layer in supported_layers(Reused())] == ["twice", "first", "head"]


def test_a_bare_layer_is_refused_because_it_has_no_name() -> None:
    with pytest.raises(SpecError, match=r"bare Linear.*Sequential"):
        supported_layers(nn.Linear(2, 2))


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_left_as_it_was(name: str) -> None:
    case = CASES[name]()
    first = next(case.model.parameters())
    first.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in case.model.parameters()]
    extractor = FeatureExtractor(case.model, case.groups, PROJECTION, seed=0)
    before = weights_of(case.model)

    extractor(lambda: case.outputs(case.model, [0, 1]))

    assert [parameter.requires_grad for parameter in case.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert not any(module._forward_hooks for module in case.model.modules())
    assert weights_of(case.model) == before


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    case = classifier_case(Perceptron())
    extractor = FeatureExtractor(case.model, case.groups, PROJECTION, seed=0)

    def fail() -> Tensor:
        case.outputs(case.model, [0])
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        extractor(fail)

    assert all(parameter.requires_grad for parameter in case.model.parameters())
    assert not any(module._forward_hooks for module in case.model.modules())


def test_a_second_call_gives_the_same_bits() -> None:
    case = language_case("llama")
    extractor = FeatureExtractor(case.model, case.groups, PROJECTION, seed=0)

    runs = [extractor(lambda: case.outputs(case.model, [0, 1, 2])) for _ in range(2)]

    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_no_gradient_mode_of_the_caller_does_not_matter() -> None:
    case = classifier_case(Perceptron())
    extractor = FeatureExtractor(case.model, case.groups, PROJECTION, seed=0)

    with torch.no_grad():
        _, found = extractor(lambda: case.outputs(case.model, [0, 1]))

    assert all(rows.norm() > 0 and not rows.requires_grad for rows in found.values())


@pytest.mark.parametrize("inside", [True, False], ids=["around the output", "around the call"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bfloat16_autocast_keeps_the_direction_of_features(kind: str, inside: bool) -> None:
    case = language_case(kind)
    extractor = FeatureExtractor(case.model, case.groups, Logra(rank=8), seed=0)
    rows = [0, 2, 4]
    _, exact = extractor(lambda: case.outputs(case.model, rows))

    def autocast_output() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return case.outputs(case.model, rows)

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        outputs, found = extractor(autocast_output)

    assert outputs.dtype == torch.float32
    assert all(features.dtype == torch.float32 for features in found.values())
    whole, rounded = (torch.cat(list(features.values()), 1) for features in (exact, found))
    assert functional.cosine_similarity(whole, rounded, dim=1).min() >= 0.999


def test_a_group_that_the_output_does_not_depend_on_has_zero_features() -> None:
    model = Perceptron().eval()
    hidden: list[Tensor] = []
    model.layers[2].register_forward_hook(lambda module, args, output: hidden.append(output.sum(1)))

    def output() -> Tensor:
        hidden.clear()
        model(torch.ones(4, 6))
        return hidden[0]

    features = extract(model, output=output)

    assert features["layers.4"].shape == (4, 9)
    assert not features["layers.4"].any()
    assert features["layers.0"].any()


@pytest.mark.parametrize("name", ["unused", "silent"])
def test_a_module_that_takes_part_in_no_forward_pass_is_named(name: str) -> None:
    with pytest.raises(DataError, match=f"^{name}: took part in no forward pass .* features.groups.exclude"):
        extract(Mixed(), "used", name)


@pytest.mark.parametrize("rows", [4, 6])
def test_an_input_without_a_batch_is_named(rows: int) -> None:
    model = Mixed()

    with pytest.raises(DataError, match=r"^single: its input has shape \(6,\), but there are \d examples"):
        extract(model, "used", "single", output=lambda: model(torch.ones(rows, 6)).sum(1))


def test_an_input_whose_first_dimension_is_not_the_examples_is_named() -> None:
    model = Perceptron()

    with pytest.raises(DataError, match=r"layers.0: its input has shape \(8, 6\), but there are 4 examples"):
        extract(model, output=lambda: model(torch.ones(8, 6)).view(4, 2, 3).sum((1, 2)))


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        (torch.sum, r"found torch.float32 of shape \(\); it must return one floating-point number per example"),
        (lambda value: value, r"of shape \(4, 3\)"),
        (lambda value: value.argmax(1), r"found torch.int64 of shape \(4,\)"),
        (lambda value: value.sum(1).detach(), "does not depend on any parameter group. Was it detached"),
    ],
)
def test_an_output_that_is_not_one_number_per_example_is_refused(
    reduce: Callable[[Tensor], Tensor], message: str
) -> None:
    model = Perceptron()

    with pytest.raises(SpecError, match=message):
        extract(model, output=lambda: reduce(model(torch.ones(4, 6))))


def test_training_mode_is_refused_whenever_it_is_met() -> None:
    model = language_model("gpt2")
    extractor = FeatureExtractor(model, groups_of(model, "transformer.h.0.attn.c_attn"), PROJECTION, seed=0)
    model.get_submodule("transformer.drop").train()

    with pytest.raises(SpecError, match=r"^transformer.drop: in training mode.*model.eval\(\)"):
        extractor(lambda: torch.zeros(1))
    with pytest.raises(SpecError, match=r"GPT2LMHeadModel, transformer, transformer.wte and \d+ more"):
        FeatureExtractor(model.train(), groups_of(model, "transformer.h.0.attn.c_attn"), PROJECTION, seed=0)


def test_groups_of_another_model_are_refused() -> None:
    group = groups_of(Perceptron(), "layers.0")[0]
    model = Perceptron().eval()

    with pytest.raises(SpecError, match=r"layers.1: the model has no supported layer of that name"):
        FeatureExtractor(model, [replace(group, name="layers.1", layers=("layers.1",))], PROJECTION, seed=0)
    with pytest.raises(SpecError, match=r"layers.0: the model's layer is \(8, 6\), the group's \(9, 6\)"):
        FeatureExtractor(model, [replace(group, out_features=9)], PROJECTION, seed=0)


def test_a_head_that_is_tied_to_an_embedding_is_refused() -> None:
    model = language_model("gpt2")

    with pytest.raises(SpecError, match=r"^lm_head: its weight is also that of transformer.wte \(Embedding\)"):
        FeatureExtractor(model, groups_of(model, "lm_head"), PROJECTION, seed=0)
