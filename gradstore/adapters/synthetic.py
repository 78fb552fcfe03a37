"""The model whose gradients are planted features: for stores of any size, of which it is known what is to be found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from gradstore.adapters.protocol import Examples, Facts, SourceFacts
from gradstore.errors import SpecError
from gradstore.spec import SPLITS, DataSection, ModelSection, SplitSection, key_of, resolve_kind
from gradstore.store.examples import Example, hash_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradstore.numerics.planted import Planted

OUTPUT: Final = "linear"
FUNCTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_UNHEARD: Final = ("output", "weights", "optimizer", "peft", "gguf_file", "config", "revision")


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticOptions:
    """[model.options].

    Attributes
    ----------
    groups
        Number of layers, which are the parameter groups.
    features
        Features of every group: a layer [r_o, r_i] with r_o r_i = features, as square as can be.
    topics, contributors, noisy
        What is planted: see `gradstore.numerics.planted.Planting`.
    """

    groups: int
    features: int
    topics: int = 64
    contributors: int = 5
    noisy: float = 0.5

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise SpecError(f"model.options.groups: found {self.groups}; accepted: an integer of at least 1.")
        if min(self.shape) < 2:
            raise SpecError(
                f"model.options.features: found {self.features}; accepted: a product of two numbers above 1, such as 128 = "
                "8 x 16, because the features of a group are a matrix."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(r_o, r_i), the first not above the second."""
        short = next((size for size in range(math.isqrt(max(self.features, 0)), 0, -1) if self.features % size == 0), 0)
        return short, self.features // max(short, 1)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, seven to a block."""
        return tuple(
            f"layers.{place // len(FUNCTIONS)}.{FUNCTIONS[place % len(FUNCTIONS)]}" for place in range(self.groups)
        )


# Without slots: what is planted is found out when it is first needed, once.
@dataclass(frozen=True)
class Synthetic:
    r"""f(x; W) = sum_j <W_j, F_j(x)> with the F_j of `gradstore.numerics.planted`, which are its gradients.

    The weights are zero, and so is f. Every layer sees the positions t = 1 ... r_i of an example with the inputs x_t = R e_t:

    .. math:: f = \sum_j \sum_t \langle D_{jt}(x), W_j x_t \rangle
    """

    model: ModelSection
    data: DataSection
    seed: int

    def __post_init__(self) -> None:
        """Refuse what is said in run.toml and would not be heard."""
        for key in _UNHEARD:
            if getattr(self.model, key) is not None:
                raise SpecError(f"model.{key}: found {getattr(self.model, key)!r}; a synthetic model has no such key.")
        for name, section in self.data.splits().items():
            for key, field in SplitSection.model_fields.items():
                if key not in ("source", "rows") and getattr(section, key) != field.default:
                    raise SpecError(
                        f"{key_of(name)}.{key}: found {getattr(section, key)!r}; a synthetic split has source and rows alone."
                    )
            if section.rows is None:
                raise SpecError(f"{key_of(name)}.rows: is missing; a synthetic split has as many rows as it declares.")
        _ = self._options

    def load(self, device: str) -> nn.Module:
        """Return the layers, with weights of zero."""
        import torch
        from torch import nn

        shape, blocks = self._options.shape, nn.ModuleList()
        for name in self._options.names:
            *_, block, function = name.split(".")
            if int(block) == len(blocks):
                blocks.append(nn.ModuleDict())
            layer = nn.Linear(shape[1], shape[0], bias=False, device=device)
            with torch.no_grad():
                layer.weight.zero_()
            blocks[-1].add_module(function, layer)
        return nn.ModuleDict({"layers": blocks}).eval()

    def examples(self) -> Examples:
        """Return the rows that every split declares, with their topics as labels.

        Raises
        ------
        SpecError
            If what is asked for cannot be planted in them.
        """
        positions = self._options.shape[1]
        splits: dict[str, list[Example]] = {}
        for number, name in enumerate(self.data.splits()):
            rows = splits.setdefault(name, [])
            for row, topic in enumerate(self.planted.topics[name].tolist()):
                inputs = {"set": np.asarray(number, np.int64), "row": np.asarray(row, np.int64)}
                example = Example(
                    example_id=f"{name}-{row}",
                    source=self.data.splits()[name].source,
                    label=f"topic-{topic}",
                    text="",
                    content_hash=hash_inputs(inputs),
                    size=positions,
                    inputs=inputs,
                )
                rows.append(example)
        rows_of = {name: len(rows) for name, rows in splits.items()}
        facts = SourceFacts(
            source="the planted structure",
            documents=sum(rows_of.values()),
            duplicates=0,
            alike=0,
            empty=0,
            short=0,
            noun="examples",
        )
        return Examples(splits=splits, facts=Facts(sources=(facts,), rows=rows_of))

    def outputs(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return f [B], which is zero, with the planted features as its gradients."""
        import torch

        parameter = next(model.parameters())

        def as_tensor(values: np.ndarray) -> Tensor:
            return torch.from_numpy(values).to(parameter.device, parameter.dtype)

        total, places = parameter.new_zeros(len(examples)), places_of(examples)
        inputs = as_tensor(np.ascontiguousarray(self.planted.inputs)).expand(len(examples), -1, -1)
        for group, name in enumerate(self.names):
            gradients = as_tensor(self.output_gradients(group, places)).transpose(1, 2)
            total = total + (model.get_submodule(name)(inputs) * gradients).sum((1, 2))
        return total

    def output_gradients(self, group: int, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """D_t, in one group, of the examples whose places `places_of` found: float32 [B, r_o, positions]."""
        sets, rows = places
        names = [*self.data.splits()]
        if (sets == sets[0]).all():
            return self.planted.output_gradients(names[sets[0]], group, rows)
        found = np.empty((len(rows), *self._options.shape), np.float32)
        for number in np.unique(sets):
            found[sets == number] = self.planted.output_gradients(names[number], group, rows[sets == number])
        return found

    def identity(self) -> dict[str, Any]:
        """Return the adapter, what is planted and in how many rows, and the seed."""
        rows = {name: section.rows for name, section in self.data.splits().items()}
        return {
            "adapter": "synthetic",
            "output": OUTPUT,
            "planted": {**asdict(self._options), "rows": rows, "seed": self.seed},
        }

    def output_heads(self, model: nn.Module) -> tuple[str, ...]:
        """Return nothing: every layer is a group."""
        return ()

    def longest(self, split: str) -> int:
        """Return the positions of every example."""
        return self._options.shape[1]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return self._options.names

    @property
    def features(self) -> int:
        """Parameters of every layer."""
        return self._options.features

    @cached_property
    def planted(self) -> Planted:
        """What is planted.

        Raises
        ------
        SpecError
            If it cannot be, in so few rows.
        """
        from gradstore.numerics.planted import Planted, Planting

        options = self._options
        rows = {name: section.rows or 0 for name, section in self.data.splits().items()}
        try:
            planting = Planting(
                seed=self.seed,
                groups=options.names,
                shape=options.shape,
                rows=rows,
                topics=options.topics,
                contributors=options.contributors,
                noisy=options.noisy,
                aspects=tuple(name for name in rows if name not in SPLITS),
            )
        except SpecError as error:
            raise SpecError(f"model.options.{error}") from None
        return Planted(planting)

    @cached_property
    def _options(self) -> SyntheticOptions:
        return resolve_kind({"synthetic": SyntheticOptions}, "synthetic", self.model.options, "model.options")


def places_of(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """(number of its set, row in it) of every example: int64 [B] each."""
    sets, rows = (np.array([int(example.inputs[key]) for example in examples], np.int64) for key in ("set", "row"))
    return sets, rows
