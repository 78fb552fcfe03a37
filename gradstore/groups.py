"""Parameter groups: how a model's parameters are partitioned into the M groups that weights are learned for.

This file sees layers as plain facts (names and shapes), so that a model on the meta device, or none at all, is enough.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradstore.errors import SpecError

RULES = ("module",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A module whose weight's per-example gradient gradstore can take.

    ``out_features`` and ``in_features`` are those of the canonical [out, in] weight, whatever order the module stores.
    """

    name: str
    kind: str
    out_features: int
    in_features: int

    @property
    def parameters(self) -> int:
        """Number of entries of the weight."""
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """One of the M groups j: the parameters that share one weight w_j.

    Attributes
    ----------
    name
        Stable name, stored with the features: the module's path in the model.
    layers
        Names of the modules whose weights make up the group.
    out_features, in_features
        Shape of the group's canonical gradient matrix.
    depth
        Index of the block of layers the module belongs to (the first number in its path), or None outside of them.
    function
        What the module does inside its block: the rest of the path after the number, such as ``self_attn.q_proj``.
    """

    name: str
    layers: tuple[str, ...]
    out_features: int
    in_features: int
    depth: int | None
    function: str

    @property
    def parameters(self) -> int:
        """Number of parameters in the group."""
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Parameters that belong to no group, with the reason and their share of the model."""

    name: str
    parameters: int
    share: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Every parameter of a model: in a group, or skipped with its reason."""

    groups: tuple[ParameterGroup, ...]
    skipped: tuple[Skipped, ...]
    total_parameters: int

    @property
    def coverage(self) -> float:
        """Share of the model's parameters that are in a group."""
        return sum(group.parameters for group in self.groups) / max(self.total_parameters, 1)


def depth_and_function(name: str) -> tuple[int | None, str]:
    """Split a module path at its first number: ``model.layers.3.mlp.up_proj`` -> (3, ``mlp.up_proj``)."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(match.group(1)), match.group(2)) if match else (None, name)


def partition(
    layers: Sequence[Layer],
    parameters: Mapping[str, int],
    *,
    rule: str = "module",
    include: str = ".*",
    exclude: str = "",
    heads: Sequence[str] = (),
) -> Partition:
    """Partition a model's named parameters into groups.

    Parameters
    ----------
    layers
        The supported modules, in the order of the model.
    parameters
        Entries of every parameter tensor by name; a tied tensor appears once, under its first name.
    rule
        ``module``: one group per module.
    include, exclude
        Regular expressions that a module's name must, and must not, match in full.
    heads
        Modules that map hidden states to outputs (the language-model head) and are to be left out.

    Raises
    ------
    SpecError
        If the rule is unknown, an expression does not compile, or no module is left.
    """
    if rule not in RULES:
        raise SpecError(f"features.groups.rule: found {rule!r}; accepted: {', '.join(RULES)}.")
    wanted, unwanted = _pattern("include", include), _pattern("exclude", exclude)
    groups, left_out = [], {}
    for layer in layers:
        if layer.name in heads:
            left_out[layer.name] = "output head; features.groups.output_head = true takes it"
        elif not wanted.fullmatch(layer.name):
            left_out[layer.name] = f"not matched by features.groups.include = {include!r}"
        elif exclude and unwanted.fullmatch(layer.name):
            left_out[layer.name] = f"matched by features.groups.exclude = {exclude!r}"
        else:
            depth, function = depth_and_function(layer.name)
            groups.append(
                ParameterGroup(
                    name=layer.name,
                    layers=(layer.name,),
                    out_features=layer.out_features,
                    in_features=layer.in_features,
                    depth=depth,
                    function=function,
                )
            )
    if not groups:
        found = ", ".join(f"{count} {kind}" for kind, count in Counter(layer.kind for layer in layers).items())
        raise SpecError(
            f"features.groups: no parameter group is left. The model has {found or 'no supported layer'}; "
            f"include = {include!r}, exclude = {exclude!r}. Change the expressions or the model."
        )
    total = sum(parameters.values())
    grouped = {f"{name}.weight" for group in groups for name in group.layers}
    skipped = tuple(
        Skipped(name=name, parameters=count, share=count / max(total, 1), reason=_reason(name, left_out))
        for name, count in parameters.items()
        if name not in grouped
    )
    return Partition(groups=tuple(groups), skipped=skipped, total_parameters=total)


def _reason(parameter: str, left_out: Mapping[str, str]) -> str:
    module, _, kind = parameter.rpartition(".")
    if kind == "bias":
        return "biases are not taken in this version"
    return left_out.get(module, "layer kind not supported in this version")


def _pattern(key: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise SpecError(f"features.groups.{key}: {expression!r} is not a regular expression: {error}.") from error
