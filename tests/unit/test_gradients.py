"""The extractor finds every layer, leaves the model as it was, and refuses what would give wrong features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gradstore.errors import DataError, SpecError
from gradstore.groups import Grouping, Parameter, ParameterGroup, partition
from gradstore.numerics.gradients import FeatureExtractor, model_parameters
from gradstore.numerics.projection import Identity, Logra, Lorif
from tests.networks import CASES, Perceptron, Reused, classifier_case, language_case, language_model, weights_of

PROJECTION = Logra(rank=3)


class Mixed(nn.Module):
    """Layers that are not supported, not used, used without gradient, or fed without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(2, 2)
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
    groups = partition(model_parameters(model), Grouping(output_head=True, max_skipped=0.5)).groups
    return tuple(group for group in groups if not names or group.name in names)


def extract(
    model: nn.Module, *names: str, output: Callable[[], Tensor] | None = None, examples: int = 4
) -> Mapping[str, Tensor]:
    extractor = FeatureExtractor(model.eval(), groups_of(model, *names), PROJECTION, seed=0)
    return extractor(output or (lambda: model(torch.ones(4, 6)).sum(1)), examples=examples).features


def matrices_of(model: nn.Module) -> list[Parameter]:
    return [parameter for parameter in model_parameters(model).supported if parameter.category == "matrix"]


def test_linear_and_conv1d_layers_are_found_with_canonical_shapes() -> None:
    llama, gpt2 = matrices_of(language_model("llama")), matrices_of(language_model("gpt2"))

    assert len(llama) == 2 * 7 + 1
    assert llama[1] == Parameter(
        name="model.layers.0.self_attn.k_proj.weight",
        module="model.layers.0.self_attn.k_proj",
        kind="Linear",
        category="matrix",
        out_features=16,
        in_features=32,
    )
    assert [layer.kind for layer in gpt2] == ["Conv1D"] * 8
    assert (gpt2[0].name, gpt2[0].out_features, gpt2[0].in_features) == ("transformer.h.0.attn.c_attn.weight", 96, 32)


def test_parameters_are_found_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = language_model_on_meta()

    assert model_parameters(model) == model_parameters(language_model("gpt2"))


def language_model_on_meta() -> nn.Module:
    from transformers import AutoModelForCausalLM

    from tests.models import tiny_config

    model: nn.Module = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    return model


def test_a_tensor_that_is_shared_is_listed_once() -> None:
    tied = model_parameters(language_model("gpt2"), ("lm_head",))

    assert [parameter.module for parameter in matrices_of(Reused())] == ["twice", "first", "head"]
    assert [item.name for item in tied.supported if item.category == "embedding"] == [
        "transformer.wte.weight",
        "transformer.wpe.weight",
    ]


def test_a_bare_layer_is_refused_because_it_has_no_name() -> None:
    with pytest.raises(SpecError, match=r"bare Linear.*Sequential"):
        model_parameters(nn.Linear(2, 2))


class Unsupported(nn.Module):
    """A parameter for each reason for which its gradient cannot be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1, 6))
        self.attention = nn.MultiheadAttention(6, 2)
        self.recurrent = nn.GRU(6, 6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.bounded = nn.Embedding(3, 6, max_norm=1.0)
        self.store = nn.ParameterList([torch.zeros(6, 6)])
        self.sound = nn.Linear(6, 6)


def test_every_parameter_without_a_rule_has_its_reason() -> None:
    reasons = model_parameters(Unsupported()).unsupported

    for name, reason in {
        "table": "held by Unsupported beside layers of its own",
        "attention.in_proj_weight": "MultiheadAttention computes with it in one function",
        "attention.out_proj.weight": "MultiheadAttention computes with it in one function",
        "recurrent.weight_ih_l0": "GRU is recurrent",
        "normed.parametrizations.weight.original0": "parametrised",
        "bounded.weight": "max_norm",
        "store.0": "held by ParameterList, which computes nothing",
    }.items():
        assert reason in reasons[name]
    assert not any(name.startswith("sound") for name in reasons)


def test_what_the_model_has_frozen_is_frozen_whatever_holds_it() -> None:
    model = Unsupported().requires_grad_(False)

    found = model_parameters(model)

    assert not found.unsupported
    assert all(parameter.frozen for parameter in found.supported)


@pytest.mark.parametrize("name", CASES)
def test_the_model_is_left_as_it_was(name: str) -> None:
    case = CASES[name]()
    first = next(case.model.parameters())
    first.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in case.model.parameters()]
    extractor = FeatureExtractor(case.model, case.groups, PROJECTION, seed=0)
    before, hooks = weights_of(case.model), [len(module._forward_hooks) for module in case.model.modules()]

    extractor(lambda: case.outputs(case.model, [0, 1]), examples=2)

    assert [parameter.requires_grad for parameter in case.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in case.model.parameters())
    assert [len(module._forward_hooks) for module in case.model.modules()] == hooks
    assert not any(module._forward_pre_hooks for module in case.model.modules())
    assert weights_of(case.model) == before


def test_the_model_is_left_as_it_was_after_an_error() -> None:
    case = classifier_case(Perceptron())
    extractor = FeatureExtractor(case.model, case.groups, PROJECTION, seed=0)

    def fail() -> Tensor:
        case.outputs(case.model, [0])
        raise RuntimeError("no more memory")

    with pytest.raises(RuntimeError, match="no more memory"):
        extractor(fail, examples=1)

    assert all(parameter.requires_grad for parameter in case.model.parameters())
    assert not any(module._forward_hooks for module in case.model.modules())


def test_a_second_call_gives_the_same_bits() -> None:
    case = language_case("llama")
    extractor = FeatureExtractor(case.model, case.groups, PROJECTION, seed=0)

    runs = [extractor(lambda: case.outputs(case.model, [0, 1, 2]), examples=3) for _ in range(2)]

    assert torch.equal(runs[0].outputs, runs[1].outputs)
    assert all(torch.equal(runs[0].features[name], runs[1].features[name]) for name in runs[0].features)


def test_no_gradient_mode_of_the_caller_does_not_matter() -> None:
    case = classifier_case(Perceptron())
    extractor = FeatureExtractor(case.model, case.groups, PROJECTION, seed=0)

    with torch.no_grad():
        found = extractor(lambda: case.outputs(case.model, [0, 1]), examples=2).features

    assert all(rows.norm() > 0 and not rows.requires_grad for rows in found.values())


@pytest.mark.parametrize("inside", [True, False], ids=["around the output", "around the call"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bfloat16_autocast_keeps_the_direction_of_features(kind: str, inside: bool) -> None:
    case = language_case(kind)
    extractor = FeatureExtractor(case.model, case.groups, Logra(rank=8), seed=0)
    rows = [0, 2, 4]
    exact = extractor(lambda: case.outputs(case.model, rows), examples=3).features

    def autocast_output() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return case.outputs(case.model, rows)

    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        rounded = extractor(autocast_output, examples=3)

    found = rounded.features
    assert rounded.outputs.dtype == torch.float32
    assert all(features.dtype == torch.float32 for features in found.values())
    whole, near = (torch.cat(list(features.values()), 1) for features in (exact, found))
    assert functional.cosine_similarity(whole, near, dim=1).min() >= 0.999


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


def test_an_input_whose_rows_are_no_multiple_of_the_examples_is_named() -> None:
    model = Perceptron()

    with pytest.raises(DataError, match=r"layers.0: its input has shape \(6, 6\), but there are 4 examples"):
        extract(model, output=lambda: model(torch.ones(6, 6)).sum(1)[:4])


def test_an_input_that_is_written_into_after_the_call_is_refused() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = nn.Linear(6, 6)

        def forward(self, values: Tensor) -> Tensor:
            hidden = self.first(values)
            result: Tensor = self.second(hidden)
            hidden += 1
            return result

    model = Careless().eval()
    extractor = FeatureExtractor(model, groups_of(model), Identity(), seed=0)

    with pytest.raises(SpecError, match=r"second.weight: its input is changed in place after the call"):
        extractor(lambda: model(torch.ones(4, 6)).sum(1), examples=4)


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
        extractor(lambda: torch.zeros(1), examples=1)
    with pytest.raises(SpecError, match=r"GPT2LMHeadModel, transformer, transformer.wte and \d+ more"):
        FeatureExtractor(model.train(), groups_of(model, "transformer.h.0.attn.c_attn"), PROJECTION, seed=0)


def test_groups_of_another_model_are_refused() -> None:
    group = groups_of(Perceptron(), "layers.0")[0]
    model = Perceptron().eval()
    part = group.parts[0]

    with pytest.raises(SpecError, match=r"layers.0: layers.1.weight: the model has no parameter of that name"):
        FeatureExtractor(
            model, [replace(group, parts=(replace(part, parameter="layers.1.weight"),))], PROJECTION, seed=0
        )
    with pytest.raises(SpecError, match=r"layers.0: layers.0.weight is \(8, 6\) \[out, in\], the group has its part"):
        FeatureExtractor(model, [replace(group, parts=(replace(part, rows=(0, 9)),))], PROJECTION, seed=0)


def test_covariances_are_those_of_the_projected_factors_where_an_example_has_a_gradient() -> None:
    case = language_case("llama", Grouping())
    projection = Logra(rank=5)
    extractor = FeatureExtractor(case.model, case.groups, projection, seed=0)

    whole = extractor(lambda: case.outputs(case.model, [0, 1]), examples=2, covariances=True).covariances
    alone = [
        extractor(lambda row=row: case.outputs(case.model, [row]), examples=1, covariances=True).covariances  # type: ignore[misc]
        for row in (0, 1)
    ]

    part = case.groups[-1].parts[0]
    inputs: list[Tensor] = []
    module = case.model.get_submodule(part.parameter.removesuffix(".weight"))
    hook = module.register_forward_hook(lambda _, args, output: inputs.append(args[0].detach()))
    case.outputs(case.model, [0])
    hook.remove()
    _, matrix_RI = projection.part_matrices(part, seed=0)
    # Nine tokens, of which the last predicts none; what follows is padding.
    projected_TR = inputs[0][0, :8] @ matrix_RI.T
    torch.testing.assert_close(alone[0][part.key].right, projected_TR.T @ projected_TR)
    assert alone[0][part.key].positions == 8
    for key, found in whole.items():
        torch.testing.assert_close(found.left, alone[0][key].left + alone[1][key].left)
        assert found.positions == alone[0][key].positions + alone[1][key].positions


def test_directions_of_adam_are_gradients_divided_by_the_root_of_the_second_moment() -> None:
    model = Perceptron().eval()
    groups = groups_of(model)
    divisors = {
        parameter.name: 0.1 + torch.rand(parameter.out_features, parameter.in_features)
        for parameter in model_parameters(model).supported
    }
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    plain, divided = (
        FeatureExtractor(model, groups, Identity(), seed=0, divisors=given)(
            lambda: model(values).square().sum(1), examples=4
        ).features
        for given in (None, divisors)
    )

    for group in groups:
        divisor = divisors[group.parts[0].parameter].flatten()
        torch.testing.assert_close(divided[group.name], plain[group.name] / divisor)


def test_before_they_are_factorised_rank_c_factors_are_the_matrices_of_logra() -> None:
    case = classifier_case(Perceptron())
    found, wanted = (
        FeatureExtractor(case.model, case.groups, projection, seed=0)(
            lambda: case.outputs(case.model, [0, 1]), examples=2, finished=False
        ).features
        for projection in (Lorif(rank=3), Logra(rank=3))
    )

    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
