from __future__ import annotations

import pytest

from gradstore.errors import SpecError
from gradstore.groups import Layer, depth_and_function, partition

LAYERS = [
    Layer(name="model.layers.0.mlp.up", kind="Linear", out_features=4, in_features=3),
    Layer(name="model.layers.1.mlp.up", kind="Linear", out_features=4, in_features=3),
    Layer(name="lm_head", kind="Linear", out_features=10, in_features=3),
]
PARAMETERS = {
    "embed.weight": 30,
    "model.layers.0.mlp.up.weight": 12,
    "model.layers.0.mlp.up.bias": 4,
    "model.layers.1.mlp.up.weight": 12,
    "lm_head.weight": 30,
}


def test_every_parameter_is_in_a_group_or_skipped_with_its_reason() -> None:
    made = partition(LAYERS, PARAMETERS, heads=["lm_head"])
    assert [group.name for group in made.groups] == ["model.layers.0.mlp.up", "model.layers.1.mlp.up"]
    assert {skipped.name: skipped.reason.split(";")[0] for skipped in made.skipped} == {
        "embed.weight": "layer kind not supported in this version",
        "model.layers.0.mlp.up.bias": "biases are not taken in this version",
        "lm_head.weight": "output head",
    }
    assert made.coverage == pytest.approx(24 / 88)
    assert made.coverage + sum(skipped.share for skipped in made.skipped) == pytest.approx(1)


def test_depth_and_function_are_read_from_the_path() -> None:
    assert depth_and_function("model.layers.12.self_attn.q_proj") == (12, "self_attn.q_proj")
    assert depth_and_function("transformer.h.0.attn.c_attn") == (0, "attn.c_attn")
    assert depth_and_function("classifier") == (None, "classifier")


def test_expressions_choose_groups_and_say_why_the_rest_is_skipped() -> None:
    made = partition(LAYERS, PARAMETERS, include=r"model\..*", exclude=r".*\.1\..*")
    assert [group.name for group in made.groups] == ["model.layers.0.mlp.up"]
    reasons = {skipped.name: skipped.reason for skipped in made.skipped}
    assert "matched by features.groups.exclude" in reasons["model.layers.1.mlp.up.weight"]
    assert "not matched by features.groups.include" in reasons["lm_head.weight"]


def test_no_group_left_is_an_error_that_says_what_the_model_has() -> None:
    with pytest.raises(SpecError, match=r"no parameter group is left\. The model has 3 Linear"):
        partition(LAYERS, PARAMETERS, include="nothing")


def test_a_broken_expression_and_an_unknown_rule_are_named() -> None:
    with pytest.raises(SpecError, match=r"features\.groups\.include: '\(' is not a regular expression"):
        partition(LAYERS, PARAMETERS, include="(")
    with pytest.raises(SpecError, match=r"features\.groups\.rule: found 'head'; accepted: module"):
        partition(LAYERS, PARAMETERS, rule="head")
