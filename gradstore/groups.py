"""Parameter groups: how a model's parameters are partitioned into the M groups that weights are learned for.

This file sees parameters as plain facts (names and shapes), so that a model on the meta device, or none at all, is enough.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from gradstore.errors import SpecError

Category = Literal["matrix", "bias", "norm", "embedding"]
Span = tuple[int, int]

RULES: Final = ("tensor", "module", "block", "head", "patterns")
# The yes/no key of [features.groups] that takes the parameters of a category; a matrix needs none.
_SWITCHES: Final[Mapping[str, str]] = {"bias": "biases", "norm": "norms", "embedding": "embeddings"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A parameter tensor whose per-example gradient can be taken.

    Attributes
    ----------
    name
        Its name in the model; of a tensor with several names (tied) the first.
    module
        The module that holds it: the name without its last part.
    kind
        The kind of that module: ``Linear``, ``Conv1D``, ``LayerNorm``, ...
    category
        What [features.groups] asks for by its yes/no keys: a ``matrix`` is always taken.
    out_features, in_features
        Shape of the canonical matrix, whatever order the module stores: [out, in] of a linear map, [out, in x window] of a
        convolution, [vocabulary, width] of an embedding, [n, 1] of a bias or scale; leading dimensions are folded into out.
    frozen
        Whether the model has it frozen, as PEFT does with all but its adapters.
    """

    name: str
    module: str
    kind: str
    category: Category
    out_features: int
    in_features: int
    frozen: bool = False

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.out_features * self.in_features


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A range of rows and columns of one parameter's canonical matrix: all of it but for attention heads."""

    parameter: str
    rows: Span
    columns: Span

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return self.rows[1] - self.rows[0]

    @property
    def in_features(self) -> int:
        """Number of columns."""
        return self.columns[1] - self.columns[0]

    @property
    def size(self) -> int:
        """Number of entries."""
        return self.out_features * self.in_features

    @property
    def key(self) -> str:
        """What random draws for this part are keyed by, and what its covariances are called."""
        return f"{self.parameter}[{self.rows[0]}:{self.rows[1]},{self.columns[0]}:{self.columns[1]}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """One of the M groups j: the parameters that share one weight w_j.

    Attributes
    ----------
    name
        Stable name, stored with the features.
    parts
        What the group is made of, in the order of the model.
    depth
        Index of the block of layers the group belongs to (the first number in its path), or None outside of them.
    function
        What the group does inside its block: the rest of the path after the number, such as ``self_attn.q_proj``.
    """

    name: str
    parts: tuple[Part, ...]
    depth: int | None
    function: str

    @property
    def parameters(self) -> int:
        """Number of parameters in the group."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped:
    """Parameters that belong to no group, with the reason and their share of the model.

    ``chosen`` tells those that run.toml leaves out from those whose gradient cannot be taken.
    """

    name: str
    parameters: int
    share: float
    reason: str
    chosen: bool


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParameters:
    """What a partition needs to know of a model.

    Attributes
    ----------
    supported
        The parameters whose gradient can be taken, in the order of the model.
    unsupported
        Why it cannot be of each of the others, by name.
    sizes
        Entries of every parameter tensor by name; a tied tensor appears once, under its first name.
    output_heads
        Modules that map hidden states to outputs (the language-model head).
    attention
        Of parameters that attention heads share out, the parts of each head: {parameter: {group name: parts}}.
    """

    supported: Sequence[Parameter]
    unsupported: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, int]
    output_heads: Sequence[str] = ()
    attention: Mapping[str, Mapping[str, Sequence[Part]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouping:
    r"""The rule by which parameters are partitioned: [features.groups] of run.toml.

    Attributes
    ----------
    rule
        ``tensor``, ``module``, ``block`` (all tensors of one numbered block of layers; outside of blocks, of a module),
        ``head`` (an attention head's rows and columns of its projections; a module elsewhere), or ``patterns``.
    patterns
        For that rule: {group name: regular expression that parameter names match in full}; the first that matches counts,
        and a name may refer to what it matched, as in ``"layer \1"``.
    include, exclude
        Regular expressions that a parameter's or its module's name must, and must not, match in full.
    biases, norms, embeddings, output_head
        Whether these are taken too.
    max_skipped
        Largest share of the parameters outside embeddings and output heads whose gradient cannot be taken.
    """

    rule: str = "module"
    patterns: Mapping[str, str] = field(default_factory=dict)
    include: str = ".*"
    exclude: str = ""
    biases: bool = False
    norms: bool = False
    embeddings: bool = False
    output_head: bool = False
    max_skipped: float = 0.2


def depth_and_function(name: str) -> tuple[int | None, str]:
    """Split a path at its first number: ``model.layers.3.mlp.up_proj`` -> (3, ``mlp.up_proj``)."""
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(match.group(1)), match.group(2)) if match else (None, name)


def partition(model: ModelParameters, grouping: Grouping) -> Partition:
    """Partition a model's named parameters into groups.

    Raises
    ------
    SpecError
        If the rule is unknown, no attention head is known for a rule of heads, an expression does not compile, a group's
        name cannot be made from what its expression matches, no parameter is left, or the gradients of too many
        parameters cannot be taken.
    """
    if grouping.rule not in RULES:
        raise SpecError(f"features.groups.rule: found {grouping.rule!r}; accepted: {', '.join(RULES)}.")
    if (grouping.rule == "patterns") != bool(grouping.patterns):
        raise SpecError('features.groups: rule = "patterns" and a table [features.groups.patterns] need each other.')
    if grouping.rule == "head" and not model.attention:
        raise SpecError(
            'features.groups.rule = "head": the model has no attention whose heads are known: modules with head_dim and '
            'projections of the usual names, such as q_proj and o_proj. Use rule = "module".'
        )
    names = _Names(grouping)
    taken: dict[str, list[Part]] = {}
    left_out: dict[str, str] = {}
    for parameter in model.supported:
        reason = names.left_out(parameter, model.output_heads)
        if reason is not None:
            left_out[parameter.name] = reason
            continue
        for name, parts in names.groups(parameter, model.attention):
            taken.setdefault(name, []).extend(parts)
    if not taken:
        raise SpecError(_nothing_left(model, left_out))
    made = Partition(
        groups=tuple(_group(name, parts, grouping.rule) for name, parts in taken.items()),
        skipped=tuple(_skipped(model, taken, left_out)),
        total_parameters=sum(model.sizes.values()),
    )
    _refuse_too_much_skipped(model, made, grouping.max_skipped)
    return made


class _Names:
    """The names of groups under a rule, and why a parameter is in none."""

    def __init__(self, grouping: Grouping) -> None:
        self._grouping = grouping
        self._wanted = _pattern("include", grouping.include)
        self._unwanted = _pattern("exclude", grouping.exclude)
        self._patterns = {
            name: _pattern(f"patterns.{name}", expression) for name, expression in grouping.patterns.items()
        }

    def left_out(self, parameter: Parameter, output_heads: Sequence[str]) -> str | None:
        """Why a parameter is left out, as the model or run.toml has it, or None if it is not."""
        grouping, names = self._grouping, (parameter.name, parameter.module)
        switch = _SWITCHES.get(parameter.category)
        patterns = self._patterns.values()
        reasons = {
            "frozen in the model": parameter.frozen,
            "output head; features.groups.output_head = true takes it": (
                parameter.module in output_heads and not grouping.output_head
            ),
            f"{parameter.category}; features.groups.{switch} = true takes it": (
                switch is not None and not getattr(grouping, switch)
            ),
            f"not matched by features.groups.include = {grouping.include!r}": (
                not any(map(self._wanted.fullmatch, names))
            ),
            f"matched by features.groups.exclude = {grouping.exclude!r}": (
                bool(grouping.exclude) and any(map(self._unwanted.fullmatch, names))
            ),
            "matched by none of features.groups.patterns": (
                bool(patterns) and not any(pattern.fullmatch(parameter.name) for pattern in patterns)
            ),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def groups(
        self, parameter: Parameter, attention: Mapping[str, Mapping[str, Sequence[Part]]]
    ) -> Iterator[tuple[str, Sequence[Part]]]:
        """The groups that a parameter has parts in, and those parts."""
        if self._grouping.rule == "head" and parameter.name in attention:
            yield from attention[parameter.name].items()
            return
        whole = Part(parameter=parameter.name, rows=(0, parameter.out_features), columns=(0, parameter.in_features))
        yield self._name(parameter), [whole]

    def _name(self, parameter: Parameter) -> str:
        rule = self._grouping.rule
        if rule == "tensor":
            return parameter.name
        if rule == "block":
            block = re.match(r"(?:.*?\.)?\d+(?=\.|$)", parameter.module)
            return block.group(0) if block else parameter.module
        if rule == "patterns":
            match, name = next(
                (match, name)
                for name, pattern in self._patterns.items()
                if (match := pattern.fullmatch(parameter.name)) is not None
            )
            return _expanded(match, name)
        return parameter.module


def _expanded(match: re.Match[str], name: str) -> str:
    """The name of the group of what a pattern matched."""
    expression, parameter = match.re.pattern, match.string
    try:
        expanded = match.expand(name)
    except (re.error, IndexError) as error:
        raise SpecError(
            f"features.groups.patterns: no name can be made of {name!r} and what {expression!r} matches: {error}. "
            "Refer to groups that the expression has, and double other backslashes."
        ) from error
    if not expanded:
        raise SpecError(
            f"features.groups.patterns: {name!r} = {expression!r} gives {parameter} an empty name. Put text into it."
        )
    return expanded


def _nothing_left(model: ModelParameters, left_out: Mapping[str, str]) -> str:
    """What there was to take, and why none of it was."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(item.kind for item in model.supported).items())
    if not model.supported:
        reasons = Counter(model.unsupported.values()).most_common()
        found = f"no supported layer{''.join(f'; {count} {reason}' for reason, count in reasons)}"
        return f"features.groups: no parameter group is left. The model has {found}. Use another model."
    reasons = Counter([*left_out.values(), *model.unsupported.values()]).most_common()
    shown = "; ".join(f"{count} {reason}" for reason, count in reasons)
    return (
        f"features.groups: no parameter group is left. The model has parameters of {kinds}, left out: {shown}. "
        "Change [features.groups]."
    )


def _group(name: str, parts: Sequence[Part], rule: str) -> ParameterGroup:
    if rule == "block":
        block = re.search(r"(?:^|\.)(\d+)$", name)
        depth, function = (int(block.group(1)), "block") if block else (None, name)
    elif rule == "patterns":
        places = {depth_and_function(part.parameter)[0] for part in parts}
        depth, function = (places.pop() if len(places) == 1 else None), name
    else:
        depth, function = depth_and_function(name)
    return ParameterGroup(name=name, parts=tuple(parts), depth=depth, function=function)


def _skipped(
    model: ModelParameters, taken: Mapping[str, Sequence[Part]], left_out: Mapping[str, str]
) -> Iterator[Skipped]:
    grouped = {part.parameter for parts in taken.values() for part in parts}
    total = max(sum(model.sizes.values()), 1)
    for name, count in model.sizes.items():
        if name in grouped:
            continue
        chosen = name in left_out
        reason = left_out[name] if chosen else model.unsupported.get(name, "layer kind not supported")
        yield Skipped(name=name, parameters=count, share=count / total, reason=reason, chosen=chosen)


def _refuse_too_much_skipped(model: ModelParameters, made: Partition, limit: float) -> None:
    """Refuse to attribute with a part of the model that nobody chose to leave out."""
    apart = {item.name for item in model.supported if item.category == "embedding" or item.module in model.output_heads}
    counted = sum(count for name, count in model.sizes.items() if name not in apart)
    lost = sorted((item for item in made.skipped if not item.chosen), key=lambda item: -item.parameters)
    share = sum(item.parameters for item in lost) / max(counted, 1)
    if share > limit:
        shown = "; ".join(f"{item.name} ({item.parameters:,}: {item.reason})" for item in lost[:3])
        raise SpecError(
            f"features.groups: the gradients of {share:.1%} of the parameters outside embeddings and output heads cannot "
            f"be taken; accepted: {limit:.1%}. The largest: {shown}. If that is meant, "
            f"set features.groups.max_skipped = {min(share + 0.01, 1):.2f}."
        )


def _pattern(key: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise SpecError(f"features.groups.{key}: {expression!r} is not a regular expression: {error}.") from error
