"""What is seen of a model's layers during one forward and one backward pass, and what is kept of it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradstore.errors import DataError
from gradstore.groups import Part
from gradstore.numerics.gradients.apart import joined, rows_of
from gradstore.numerics.gradients.kept import Kept, shares_memory
from gradstore.numerics.gradients.layers import Supported, canonical_of
from gradstore.numerics.gradients.rules import Call, Factors, OneByOne, Rule, Whole
from gradstore.numerics.projection import Projector, TwoSided


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the features of a part go: columns of its group's."""

    group: str
    part: Part
    projector: Projector
    columns: slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """A module with parameters that are in a group."""

    name: str
    module: nn.Module
    tensors: dict[str, tuple[Supported, list[tuple[Rule, Target]]]] = field(default_factory=dict)

    def add(self, attribute: str, item: Supported, rule: Rule, target: Target) -> None:
        """Add a part of one of its parameters."""
        self.tensors.setdefault(attribute, (item, []))[1].append((rule, target))

    def of_kind(self, kind: type[Rule]) -> list[tuple[str, Any, Target]]:
        """(attribute, rule, target) of every part whose rule is of a kind."""
        return [
            (attribute, rule, target)
            for attribute, (_, parts) in self.tensors.items()
            for rule, target in parts
            if isinstance(rule, kind)
        ]


class Recording:
    """The features that hooks make during one forward and backward pass.

    Parameters
    ----------
    examples
        B.
    widths
        k_j by group.
    covariances
        Whether those of projected factors are summed too.
    """

    def __init__(self, *, examples: int, widths: Mapping[str, int], covariances: bool) -> None:
        self.covariances: dict[str, tuple[Tensor, Tensor, int]] = {}
        self._examples = examples
        self._widths = widths
        self._with_covariances = covariances
        self.given_to_each: list[str] = []
        self._features: dict[str, Tensor] = {}
        self._seen: set[nn.Module] = set()
        self._paused = False
        # Those whose calls are under way: all examples, or the one that a module is run once more for.
        self._rows = slice(0, examples)
        # Modules that are to be run once more, with what they were called with, and those that are.
        self._entered: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._repeated: set[nn.Module] = set()

    @contextmanager
    def watch(self, watched: Watched) -> Iterator[None]:
        """Have hooks in a module that see its calls."""
        module = watched.module
        if watched.of_kind(OneByOne):
            handles = self._watch_repeated(watched)
        else:
            # First, so that it sees the layer's own output: the model may have hooks that change it.
            handles = [module.register_forward_hook(self._hook(watched), with_kwargs=True, prepend=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch_repeated(self, watched: Watched) -> list[RemovableHandle]:
        """Hooks around a module that is run once more: around all of the model's own, which are repeated with it."""
        module = watched.module

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._watching(module):
                self._entered[module] = (args, kwargs)

        def repeat(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if module not in self._entered:
                return None
            args, kwargs = self._entered.pop(module)
            self._seen.add(module)
            return self._one_by_one(watched, args, kwargs, output)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._entered.pop(module, None)

        return [
            module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(repeat),
            # Even after an error, which the model may have an answer to.
            module.register_forward_hook(leave, always_call=True),
        ]

    def _hook(self, watched: Watched) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self._watching(module):
                return None
            self._seen.add(module)
            return self._tapped(watched, self._call(watched.name, args, kwargs), output)

        return hook

    def _watching(self, module: nn.Module) -> bool:
        """Whether a call of a module counts: not within one that is run once more and has its turn then."""
        return not (self._paused or self._entered or module in self._repeated) and torch.is_grad_enabled()

    def refuse_unseen(self, watched: Sequence[Watched]) -> None:
        """Refuse a pass in which a module took no part.

        Raises
        ------
        DataError
            Naming it.
        """
        unseen = [
            item.name
            for item in watched
            # Of a tensor that is tied one module may do.
            if not all(any(use.module in self._seen for use, _ in held.uses) for held, _ in item.tensors.values())
        ]
        if unseen:
            more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
            raise DataError(
                f"{', '.join(unseen[:3])}{more}: took part in no forward pass of this batch, so there is no gradient to "
                "take; a model may also read a layer's weight without calling the layer, which is not seen. Leave out what "
                "the model does not call with features.groups.exclude."
            )

    def explain(self, error: Exception) -> None:
        """Say what may have made the model fail: a shape that it does not expect.

        Raises
        ------
        DataError
            If modules that are called once for all examples were given to each by itself.
        """
        if self.given_to_each and not isinstance(error, torch.OutOfMemoryError):
            names = ", ".join(dict.fromkeys(self.given_to_each))
            raise DataError(
                f"{names}: called once for all examples, and the model fails if each is given an output of its own: "
                f"{str(error).rstrip('.')}. Leave out what all examples share with features.groups.exclude."
            ) from error

    def features_of(self, group: str, like: Tensor) -> Tensor:
        """The features [B, k] of a group; zeros if nothing was seen of it."""
        found = self._features.get(group)
        return like.new_zeros(self._examples, self._widths[group]) if found is None else found

    def _call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The input of a call, refused if its examples cannot be told apart."""
        named = dict(kwargs)
        value = args[0] if args else named.pop(next(iter(named)), None) if named else None
        if not isinstance(value, Tensor):
            raise DataError(
                f"{name}: it is called with {type(value).__name__}, not with a tensor whose first dimension are the "
                "examples. Leave it out with features.groups.exclude."
            )
        if not self._has_examples(value):
            raise DataError(
                f"{name}: its input has shape {tuple(value.shape)}, but there are {self._examples} examples. The examples "
                "must be its first dimension; a module that mixes them has no per-example gradient. "
                "Leave it out with features.groups.exclude."
            )
        return value, args[1:], named

    def _has_examples(self, value: Tensor) -> bool:
        if value.dim() == 1 and value.is_floating_point():
            return False
        return value.dim() > 0 and (
            (value.dim() > 1 and len(value) == 1) or (len(value) > 0 and len(value) % self._count == 0)
        )

    @property
    def _count(self) -> int:
        """How many examples the calls have that are under way."""
        return self._rows.stop - self._rows.start

    def _tapped(self, watched: Watched, call: Call, output: Tensor) -> Tensor:
        """Keep what is needed of a call's input, and have the output's gradient make the features."""
        module, examples = watched.module, self._count
        value, rest, named = call
        if value.shape[0] == 1 and examples > 1:
            # What is computed once for all examples, such as position embeddings, is given to each by itself.
            value = value.expand(examples, *value.shape[1:])
            output = output.expand(examples, *output.shape[1:])
            self.given_to_each.append(watched.name)
        # The output's precision is the layer's own, whether the caller chose it by autocast or by the weights.
        dtype = _working_dtype(output.dtype)
        late: list[Callable[[Tensor], None]] = []
        with torch.no_grad(), torch.autocast(output.device.type, enabled=False):
            detached = value.detach()
            early = detached.to(dtype) if value.is_floating_point() else detached
            for _, rule, target in watched.of_kind(Factors):
                late.append(self._factors(module, rule, target, early))
        for _, rule, target in watched.of_kind(Whole):
            kept = Kept(watched.name, detached) if rule.needs_input else None
            late.append(self._whole(module, rule, target, (kept, rest, named)))

        def add_features(gradient: Tensor) -> None:
            working = gradient.to(dtype)
            for add in late:
                add(working)

        # Every parameter is frozen, so the graph starts at the first of the groups' layers, and nothing before it
        # is differentiated. The clone, no leaf, allows what follows to work in place.
        tapped = output if output.requires_grad else output.detach().requires_grad_().clone()
        tapped.register_hook(add_features)  # type: ignore[no-untyped-call]
        return tapped

    def _factors(self, module: nn.Module, rule: Factors, target: Target, value: Tensor) -> Callable[[Tensor], None]:
        """Project the factor that is known now; return what projects the other and makes the features."""
        projector, part, examples, rows = target.projector, target.part, self._count, self._rows
        project = {
            "left": lambda factor: projector.left(_within(factor, part.rows)),
            "right": lambda factor: projector.right(_within(factor, part.columns)),
        }
        first, second = ("left", "right") if rule.early == "left" else ("right", "left")
        found = rule.forward(module, value, examples)
        kept = found if rule.projected else project[first](found)
        # What is the input itself, unprojected, is the model's to write into.
        holder = Kept(part.parameter, kept) if shares_memory(kept, value) else None
        given = Kept(part.parameter, value) if rule.needs_input else None
        del found, value

        def add(gradient: Tensor) -> None:
            early = kept if holder is None else holder.value()
            late = rule.backward(module, None if given is None else given.value(), gradient, examples)
            sides = {first: early, second: project[second](late)}
            self._add(target, rows, projector.combine(sides["left"], sides["right"]))
            if self._with_covariances and isinstance(projector, TwoSided):
                scaled = (sides[side] * scale for side, scale in zip(("left", "right"), projector.scales, strict=True))
                self._add_covariance(part.key, *scaled)

        return add

    def _whole(
        self,
        module: nn.Module,
        rule: Whole,
        target: Target,
        kept: tuple["Kept | None", tuple[Any, ...], dict[str, Any]],
    ) -> Callable[[Tensor], None]:
        part, examples, rows = target.part, self._count, self._rows

        def add(gradient: Tensor) -> None:
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            holder, rest, named = kept
            value = wide if holder is None else holder.value()
            with self._pause():
                gradient_BOI = rule.gradient(module, (value, rest, named), wide, examples)
            self._add(target, rows, target.projector.whole(_part_of(gradient_BOI, part)))

        return add

    def _one_by_one(self, watched: Watched, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Run a module once more for each example, with parameters of its own, so that autograd tells their gradients apart."""
        value, *_ = self._call(watched.name, args, kwargs)
        start, count, length = self._rows.start, self._count, value.shape[0]
        each = length // count
        if each == 0:
            self.given_to_each.append(watched.name)
        outputs = []
        for place in range(count):
            own = slice(place * each, (place + 1) * each) if each else slice(None)
            aliases = self._aliases(watched, start + place)
            arguments, keywords = rows_of(args, own, length), {key: rows_of(kwargs[key], own, length) for key in kwargs}
            with self._repeating(watched.module, start + place):
                try:
                    outputs.append(torch.func.functional_call(watched.module, aliases, arguments, keywords))
                except (RuntimeError, ValueError, IndexError) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        raise
                    raise DataError(
                        f"{watched.name}: it does not run for one example of the batch alone: "
                        f"{str(error).rstrip('.')}. Leave it out with features.groups.exclude."
                    ) from error
        return joined(watched.name, outputs, output)

    def _aliases(self, watched: Watched, example: int) -> dict[str, Tensor]:
        """A leaf for every parameter of the module that is in a group, which shares its memory."""
        aliases = {}
        for attribute, (item, parts) in watched.tensors.items():
            alias = item.tensor.detach().requires_grad_()

            def add(leaf: Tensor, parts: list[tuple[Rule, Target]] = parts) -> None:
                assert leaf.grad is not None
                gradient_1OI = canonical_of(watched.module, leaf.grad)[None]
                leaf.grad = None
                for _, target in parts:
                    features = target.projector.whole(_part_of(gradient_1OI, target.part))
                    self._add(target, slice(example, example + 1), features)

            alias.register_post_accumulate_grad_hook(add)  # type: ignore[no-untyped-call]
            aliases[attribute] = alias
        return aliases

    def _add(self, target: Target, rows: slice, features: Tensor) -> None:
        held = self._features.get(target.group)
        width = self._widths[target.group]
        whole = rows == slice(0, self._examples) and features.shape[1] == width
        if held is None and whole:
            self._features[target.group] = features
            return
        if held is None:
            held = self._features[target.group] = features.new_zeros(self._examples, width)
        held[rows, target.columns] += features

    def _add_covariance(self, part: str, left_BTR: Tensor, right_BTS: Tensor) -> None:
        wide = torch.promote_types(left_BTR.dtype, torch.float32)
        left, right = left_BTR.flatten(0, 1).to(wide), right_BTS.flatten(0, 1).to(wide)
        counted = (left != 0).any(1)
        right = right * counted[:, None]
        found = left.T @ left, right.T @ right, int(counted.sum())
        held = self.covariances.get(part)
        self.covariances[part] = found if held is None else (held[0] + found[0], held[1] + found[1], held[2] + found[2])

    @contextmanager
    def _repeating(self, module: nn.Module, example: int) -> Iterator[None]:
        """Run a module for one example; what it calls counts for that one."""
        rows, self._rows = self._rows, slice(example, example + 1)
        self._repeated.add(module)
        try:
            yield
        finally:
            self._repeated.discard(module)
            self._rows = rows

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Run modules without their being watched."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before


def _within(factor: Tensor, span: tuple[int, int]) -> Tensor:
    """The columns of a factor that belong to a part; a one-hot factor is never parted."""
    if not factor.is_floating_point() or span == (0, factor.shape[-1]):
        return factor
    return factor[..., slice(*span)]


def _part_of(gradient_BOI: Tensor, part: Part) -> Tensor:
    return gradient_BOI[:, slice(*part.rows), slice(*part.columns)]


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 stays, for its speed and range; float16 would overflow in the products, so it becomes float32."""
    return torch.float32 if dtype == torch.float16 else dtype
