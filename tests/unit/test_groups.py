"""The partition of a made-up model of two blocks, whose parameters are plain facts."""

from __future__ import annotations

import pytest

from gradstore.errors import SpecError
from gradstore.groups import (
    RULES,
    Category,
    Grouping,
    ModelParameters,
    Parameter,
    ParameterGroup,
    Part,
    Partition,
    depth_and_function,
    partition,
)


def parameter(name: str, kind: str, category: Category, shape: tuple[int, int], *, frozen: bool = False) -> Parameter:
    return Parameter(
        name=name,
        module=name.rpartition(".")[0],
        kind=kind,
        category=category,
        out_features=shape[0],
        in_features=shape[1],
        frozen=frozen,
    )


def block(index: int) -> list[Parameter]:
    prefix = f"model.layers.{index}"
    return [
        parameter(f"{prefix}.norm.weight", "LayerNorm", "norm", (4, 1)),
        parameter(f"{prefix}.attn.q.weight", "Linear", "matrix", (4, 4)),
        parameter(f"{prefix}.attn.q.bias", "Linear", "bias", (4, 1)),
        parameter(f"{prefix}.attn.o.weight", "Linear", "matrix", (4, 4)),
        parameter(f"{prefix}.mlp.up.weight", "Linear", "matrix", (6, 4)),
        parameter(f"{prefix}.mlp.up.bias", "Linear", "bias", (6, 1)),
    ]


EMBEDDING = parameter("model.embed.weight", "Embedding", "embedding", (10, 4))
HEAD = parameter("lm_head.weight", "Linear", "matrix", (10, 4))
PARAMETERS = [EMBEDDING, *block(0), *block(1), HEAD]


def whole(name: str) -> Part:
    found = next(item for item in PARAMETERS if item.name == name)
    return Part(parameter=name, rows=(0, found.out_features), columns=(0, found.in_features))


def heads(prefix: str) -> dict[str, dict[str, list[Part]]]:
    """Two heads of two dimensions: rows of q and of its bias, columns of o."""
    spans = {f"{prefix}.head.{head}": (2 * head, 2 * head + 2) for head in range(2)}
    return {
        f"{prefix}.q.weight": {
            name: [Part(parameter=f"{prefix}.q.weight", rows=span, columns=(0, 4))] for name, span in spans.items()
        },
        f"{prefix}.q.bias": {
            name: [Part(parameter=f"{prefix}.q.bias", rows=span, columns=(0, 1))] for name, span in spans.items()
        },
        f"{prefix}.o.weight": {
            name: [Part(parameter=f"{prefix}.o.weight", rows=(0, 4), columns=span)] for name, span in spans.items()
        },
    }


def model(
    supported: list[Parameter] | None = None,
    unsupported: dict[str, tuple[int, str]] | None = None,
) -> ModelParameters:
    supported = PARAMETERS if supported is None else supported
    unsupported = unsupported or {}
    return ModelParameters(
        supported=supported,
        unsupported={name: reason for name, (_, reason) in unsupported.items()},
        sizes={item.name: item.size for item in supported} | {name: size for name, (size, _) in unsupported.items()},
        output_heads=["lm_head"],
        attention={**heads("model.layers.0.attn"), **heads("model.layers.1.attn")},
    )


def grouped(made: Partition) -> dict[str, list[str]]:
    return {group.name: [part.parameter for part in group.parts] for group in made.groups}


def group(made: Partition, name: str) -> ParameterGroup:
    return next(item for item in made.groups if item.name == name)


def reasons(made: Partition) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in made.skipped}


def test_by_default_a_group_is_a_modules_matrix_and_the_rest_is_skipped_with_its_switch() -> None:
    made = partition(model(), Grouping())

    assert grouped(made) == {
        f"model.layers.{index}.{module}": [f"model.layers.{index}.{module}.weight"]
        for index in range(2)
        for module in ("attn.q", "attn.o", "mlp.up")
    }
    assert reasons(made) == {
        "model.embed.weight": "embedding; features.groups.embeddings = true takes it",
        **{f"model.layers.{i}.norm.weight": "norm; features.groups.norms = true takes it" for i in range(2)},
        **{f"model.layers.{i}.attn.q.bias": "bias; features.groups.biases = true takes it" for i in range(2)},
        **{f"model.layers.{i}.mlp.up.bias": "bias; features.groups.biases = true takes it" for i in range(2)},
        "lm_head.weight": "output head; features.groups.output_head = true takes it",
    }
    assert all(skipped.chosen for skipped in made.skipped)


@pytest.mark.parametrize("rule", ["tensor", "module", "block", "head"])
@pytest.mark.parametrize("switches", [{}, {"biases": True, "norms": True, "embeddings": True, "output_head": True}])
def test_every_entry_of_a_model_is_in_one_group_or_skipped(rule: str, switches: dict[str, bool]) -> None:
    made = partition(model(), Grouping(rule=rule, **switches))  # type: ignore[arg-type]

    entries = [
        (part.parameter, row, column)
        for item in made.groups
        for part in item.parts
        for row in range(*part.rows)
        for column in range(*part.columns)
    ]
    skipped = {item.name for item in made.skipped}
    expected = {
        (item.name, row, column)
        for item in PARAMETERS
        if item.name not in skipped
        for row in range(item.out_features)
        for column in range(item.in_features)
    }
    assert len(entries) == len(set(entries))
    assert set(entries) == expected
    assert made.total_parameters == sum(item.size for item in PARAMETERS)
    assert made.coverage + sum(item.share for item in made.skipped) == pytest.approx(1)
    assert sum(item.parameters for item in made.skipped) == made.total_parameters - len(entries)
    assert (made.coverage == 1) == bool(switches)


@pytest.mark.parametrize(
    ("switch", "gained"),
    [
        ("biases", {f"model.layers.{i}.{module}.bias" for i in range(2) for module in ("attn.q", "mlp.up")}),
        ("norms", {f"model.layers.{i}.norm.weight" for i in range(2)}),
        ("embeddings", {"model.embed.weight"}),
        ("output_head", {"lm_head.weight"}),
    ],
)
def test_a_switch_takes_its_parameters_and_no_others(switch: str, gained: set[str]) -> None:
    without = partition(model(), Grouping(rule="tensor"))
    with_them = partition(model(), Grouping(rule="tensor", **{switch: True}))  # type: ignore[arg-type]

    assert set(grouped(with_them)) - set(grouped(without)) == gained
    assert set(reasons(without)) - set(reasons(with_them)) == gained


def test_the_rule_tensor_makes_a_group_of_every_tensor_in_the_order_of_the_model() -> None:
    made = partition(model(), Grouping(rule="tensor", biases=True, norms=True, embeddings=True, output_head=True))

    assert grouped(made) == {item.name: [item.name] for item in PARAMETERS}
    assert list(grouped(made)) == [item.name for item in PARAMETERS]
    found = group(made, "model.layers.1.mlp.up.bias")
    assert (found.depth, found.function) == (1, "mlp.up.bias")
    assert found.parts == (Part(parameter=found.name, rows=(0, 6), columns=(0, 1)),)


def test_the_rule_module_puts_a_bias_beside_its_matrix() -> None:
    made = partition(model(), Grouping(rule="module", biases=True))

    found = group(made, "model.layers.0.mlp.up")
    assert found.parts == (whole("model.layers.0.mlp.up.weight"), whole("model.layers.0.mlp.up.bias"))
    assert found.parameters == 6 * 4 + 6
    assert (found.depth, found.function) == (0, "mlp.up")


def test_the_rule_block_gathers_a_block_and_outside_of_blocks_a_module() -> None:
    made = partition(model(), Grouping(rule="block", embeddings=True, output_head=True))

    matrices = ["attn.q.weight", "attn.o.weight", "mlp.up.weight"]
    assert grouped(made) == {
        "model.embed": ["model.embed.weight"],
        "model.layers.0": [f"model.layers.0.{name}" for name in matrices],
        "model.layers.1": [f"model.layers.1.{name}" for name in matrices],
        "lm_head": ["lm_head.weight"],
    }
    assert [(item.depth, item.function) for item in made.groups] == [
        (None, "model.embed"),
        (0, "block"),
        (1, "block"),
        (None, "lm_head"),
    ]


def test_a_sequence_of_modules_is_a_sequence_of_blocks() -> None:
    layers = [parameter(f"{index}.weight", "Linear", "matrix", (3, 3)) for index in (0, 2)]

    made = partition(model(layers), Grouping(rule="block"))

    assert [(item.name, item.depth, item.function) for item in made.groups] == [("0", 0, "block"), ("2", 2, "block")]


def test_the_rule_head_shares_out_the_projections_of_attention_and_takes_modules_elsewhere() -> None:
    made = partition(model(), Grouping(rule="head", biases=True))

    assert list(grouped(made)) == [
        name
        for index in range(2)
        for name in (
            f"model.layers.{index}.attn.head.0",
            f"model.layers.{index}.attn.head.1",
            f"model.layers.{index}.mlp.up",
        )
    ]
    second = group(made, "model.layers.1.attn.head.1")
    assert second.parts == (
        Part(parameter="model.layers.1.attn.q.weight", rows=(2, 4), columns=(0, 4)),
        Part(parameter="model.layers.1.attn.q.bias", rows=(2, 4), columns=(0, 1)),
        Part(parameter="model.layers.1.attn.o.weight", rows=(0, 4), columns=(2, 4)),
    )
    assert second.parameters == 2 * 4 + 2 + 4 * 2
    assert (second.depth, second.function) == (1, "attn.head.1")


def test_the_first_pattern_that_matches_names_the_group_of_a_parameter() -> None:
    patterns = {r"attention \1": r".*layers\.(\d+)\.attn\..*", "matrices": r".*\.weight"}

    made = partition(model(), Grouping(rule="patterns", patterns=patterns, biases=True, output_head=True))

    assert grouped(made) == {
        "attention 0": [f"model.layers.0.attn.{name}" for name in ("q.weight", "q.bias", "o.weight")],
        "attention 1": [f"model.layers.1.attn.{name}" for name in ("q.weight", "q.bias", "o.weight")],
        "matrices": ["model.layers.0.mlp.up.weight", "model.layers.1.mlp.up.weight", "lm_head.weight"],
    }
    assert {name: reason for name, reason in reasons(made).items() if "patterns" in reason} == {
        f"model.layers.{index}.mlp.up.bias": "matched by none of features.groups.patterns" for index in range(2)
    }
    assert [(item.depth, item.function) for item in made.groups] == [
        (0, "attention 0"),
        (None, "matrices"),
        (1, "attention 1"),
    ]


def test_a_pattern_matches_the_whole_name_of_a_parameter() -> None:
    with pytest.raises(SpecError, match=r"6 matched by none of features\.groups\.patterns"):
        partition(model(), Grouping(rule="patterns", patterns={"all": r"layers|model\.layers\.0\.mlp\.up"}))


def test_include_and_exclude_match_a_parameter_or_its_module_in_full() -> None:
    made = partition(model(), Grouping(include=r"model\.layers\.\d\.(attn\.q|mlp\.up\.weight)", exclude=r".*\.1\..*"))

    assert list(grouped(made)) == ["model.layers.0.attn.q", "model.layers.0.mlp.up"]
    found = reasons(made)
    assert found["model.layers.1.attn.q.weight"] == r"matched by features.groups.exclude = '.*\\.1\\..*'"
    assert found["model.layers.0.attn.o.weight"].startswith("not matched by features.groups.include = ")


def test_frozen_parameters_are_skipped_and_do_not_count_as_lost() -> None:
    frozen = [parameter(f"layers.{index}.base.weight", "Linear", "matrix", (64, 64), frozen=True) for index in range(2)]
    adapters = [parameter(f"layers.{index}.lora_A.weight", "Linear", "matrix", (2, 64)) for index in range(2)]

    made = partition(model([*frozen, *adapters]), Grouping(max_skipped=0))

    assert list(grouped(made)) == ["layers.0.lora_A", "layers.1.lora_A"]
    assert {skipped.reason for skipped in made.skipped} == {"frozen in the model"}
    assert all(skipped.chosen for skipped in made.skipped)


def test_a_part_says_which_entries_it_has() -> None:
    part = Part(parameter="layers.0.q.weight", rows=(2, 4), columns=(0, 3))

    assert part.key == "layers.0.q.weight[2:4,0:3]"
    assert (part.out_features, part.in_features, part.size) == (2, 3, 6)


def test_what_cannot_be_taken_is_skipped_with_its_reason_up_to_max_skipped() -> None:
    lost = {"model.scan.a": (20, "ScanLayer is not supported"), "model.scan.b": (5, "ScanLayer is not supported")}
    # Of everything outside embedding and output head: 70 entries in each block, and the 25 that cannot be taken.
    share = 25 / (2 * 70 + 25)

    made = partition(model(unsupported=lost), Grouping(max_skipped=share))

    assert [(item.name, item.chosen) for item in made.skipped if item.name in lost] == [
        ("model.scan.a", False),
        ("model.scan.b", False),
    ]
    assert reasons(made)["model.scan.a"] == "ScanLayer is not supported"
    with pytest.raises(
        SpecError,
        match=r"gradients of 15\.2% of the parameters outside embeddings and output heads cannot be taken; accepted: "
        r"10\.0%\. The largest: model\.scan\.a \(20: ScanLayer is not supported\); model\.scan\.b \(5: .*"
        r"set features\.groups\.max_skipped = 0\.16\.",
    ):
        partition(model(unsupported=lost), Grouping(max_skipped=0.1))


def test_the_share_that_an_error_suggests_is_accepted() -> None:
    for size in range(40, 60):
        lost = model(unsupported={"model.scan.a": (size, "not supported")})
        with pytest.raises(SpecError) as error:
            partition(lost, Grouping(max_skipped=0.2))
        suggested = float(str(error.value).rpartition(" = ")[2].rstrip("."))
        partition(lost, Grouping(max_skipped=suggested))


def test_what_run_toml_leaves_out_is_never_too_much() -> None:
    made = partition(model(), Grouping(include=r"model\.layers\.0\.attn\.q", max_skipped=0))

    assert made.coverage == pytest.approx(16 / made.total_parameters)


def test_embeddings_and_output_heads_are_no_part_of_what_the_skipped_are_a_share_of() -> None:
    lost = {"model.scan.a": (35, "not supported")}

    # A fifth of what remains without the 80 entries of embedding and head, with which it would be a seventh.
    with pytest.raises(SpecError, match=r"gradients of 20\.0% of"):
        partition(model(unsupported=lost), Grouping(max_skipped=0.19))


def test_no_group_left_is_an_error_that_says_what_the_model_has_and_why_it_is_left_out() -> None:
    with pytest.raises(
        SpecError,
        match=r"no parameter group is left\. The model has parameters of 1 Embedding, 2 LayerNorm, 11 Linear, left out: "
        r"6 not matched by features\.groups\.include = 'nothing'; 4 bias; features\.groups\.biases = true takes it; 2 norm;",
    ):
        partition(model(), Grouping(include="nothing"))


def test_a_model_that_is_frozen_altogether_says_so() -> None:
    frozen = [parameter("layers.0.base.weight", "Linear", "matrix", (4, 4), frozen=True)]

    with pytest.raises(SpecError, match=r"parameters of 1 Linear, left out: 1 frozen in the model\."):
        partition(model(frozen), Grouping())


def test_a_model_without_a_supported_layer_says_why_its_parameters_are_not() -> None:
    lost = {"scan.a": (4, "ScanLayer is not supported"), "scan.b": (4, "ScanLayer is not supported")}

    with pytest.raises(SpecError, match=r"has no supported layer; 2 ScanLayer is not supported\. Use another model"):
        partition(model([], lost), Grouping())


def test_an_unknown_rule_is_refused_with_those_that_there_are() -> None:
    accepted = "tensor, module, block, head, patterns"
    assert ", ".join(RULES) == accepted
    with pytest.raises(SpecError, match=rf"features\.groups\.rule: found 'layer'; accepted: {accepted}\."):
        partition(model(), Grouping(rule="layer"))


@pytest.mark.parametrize("grouping", [Grouping(rule="patterns"), Grouping(patterns={"all": ".*"})])
def test_patterns_and_their_rule_need_each_other(grouping: Grouping) -> None:
    with pytest.raises(
        SpecError, match=r'rule = "patterns" and a table \[features\.groups\.patterns\] need each other'
    ):
        partition(model(), grouping)


@pytest.mark.parametrize(
    ("key", "grouping"),
    [
        ("include", Grouping(include="(")),
        ("exclude", Grouping(exclude="(")),
        ("patterns.all", Grouping(rule="patterns", patterns={"all": "("})),
    ],
)
def test_an_expression_that_does_not_compile_is_named(key: str, grouping: Grouping) -> None:
    with pytest.raises(SpecError, match=rf"features\.groups\.{key}: '\(' is not a regular expression: missing \)"):
        partition(model(), grouping)


@pytest.mark.parametrize("name", [r"layer \2", r"\g<depth>", r"layer \q"])
def test_a_name_that_cannot_be_made_of_what_its_pattern_matches_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match=r"features\.groups\.patterns: no name can be made of .* Refer to groups that"):
        partition(model(), Grouping(rule="patterns", patterns={name: r".*layers\.(\d)\..*"}))


def test_a_pattern_that_gives_an_empty_name_is_refused() -> None:
    with pytest.raises(SpecError, match=r"gives model\.layers\.0\.attn\.q\.weight an empty name\. Put text into it"):
        partition(model(), Grouping(rule="patterns", patterns={r"\1": r".*(decoder)?.*"}))


def test_depth_and_function_are_read_from_the_path() -> None:
    assert depth_and_function("model.layers.12.self_attn.q_proj") == (12, "self_attn.q_proj")
    assert depth_and_function("transformer.h.0.attn.c_attn") == (0, "attn.c_attn")
    assert depth_and_function("blocks.3.experts.5.up") == (3, "experts.5.up")
    assert depth_and_function("classifier") == (None, "classifier")
