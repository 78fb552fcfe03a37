"""A user's own adapter: a function makes an object of three methods, and what gradstore asks besides is added here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from gradstore.adapters.models.functions import code_hash, find_function, users_code
from gradstore.adapters.models.modules import KeptInAFile, fill
from gradstore.adapters.own.splits import MASK, own_queries, split_own
from gradstore.adapters.protocol import Examples, QueryReader
from gradstore.errors import SpecError
from gradstore.spec import DataSection, ModelSection, SplitSection, content_hash, key_of, resolve_kind
from gradstore.store.examples import Example

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

OUTPUT: Final = "own"
_METHODS: Final = ("load", "examples", "output")
_KEYS: Final = ("source", "start", "rows")
_MEND: Final = "Mend it, or its arguments in model.options.arguments."


class OwnTask(Protocol):
    """What a user's function returns; see docs/extending.md.

    It may have a string or number ``version``, which then tells two codes apart instead of the hash of their file.
    """

    def load(self, source: str) -> nn.Module:
        """Return the model that ``model.source`` names, on the CPU."""
        ...

    def examples(self, source: str) -> Iterable[Mapping[str, Any]]:
        """Yield the examples of ``data.*.source``, each a mapping of inputs, and where wanted id, label, text and size."""
        ...

    def output(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Return f(example; theta) [B] of a batch: a sum over an example's own positions, never a mean over the batch."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnOptions:
    """[model.options]: the named arguments that the function is called with."""

    arguments: dict[str, Any] | None = None


# Without slots: the user's object is made when it is first needed, once.
@dataclass(frozen=True)
class OwnAdapter(KeptInAFile):
    """An `OwnTask` as an `Adapter`."""

    model: ModelSection
    data: DataSection
    seed: int

    def __post_init__(self) -> None:
        """Refuse what is said in run.toml and would not be heard."""
        for key in ("output", "peft", "gguf_file", "config", "revision"):
            if getattr(self.model, key) is not None:
                raise SpecError(
                    f"model.{key}: found {getattr(self.model, key)!r}; an adapter of one's own has no such key."
                )
        for name, section in self.data.splits().items():
            for key, field in SplitSection.model_fields.items():
                if key not in _KEYS and getattr(section, key) != field.default:
                    raise SpecError(
                        f"{key_of(name)}.{key}: found {getattr(section, key)!r}; an adapter of one's own reads its sources "
                        f"itself, so accepted are {', '.join(_KEYS)}."
                    )
        self._arguments()

    def load(self, device: str) -> nn.Module:
        """Return the model in float32 and evaluation mode, with dropout impossible.

        On ``meta`` too it is made in full, and left on the CPU: a user's module may look at values, which meta has not,
        and its ties would be lost on the way.

        Raises
        ------
        SpecError
            If the user's code fails, or returns something else.
        DataError
            If ``model.weights`` are damaged or do not fill the model.
        """
        from torch import nn
        from torch.nn.modules.dropout import _DropoutNd

        with self._explained(f"load({self.model.source!r})"):
            model = self._task.load(self.model.source)
        where = f"model.adapter: {self.model.adapter}.load({self.model.source!r})"
        if not isinstance(model, nn.Module):
            raise SpecError(f"{where} returned {type(model).__name__}; it must return a torch.nn.Module.")
        parameters = [*model.parameters()]
        if not parameters or any(parameter.is_meta for parameter in parameters):
            found = "without storage (on meta)" if parameters else "without parameters"
            raise SpecError(f"{where} returned a module {found}. Make one that has them, on the CPU.")
        model = model.float()
        if self.model.weights is not None:
            fill(model, self.model.weights)
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.p = 0.0
        return model.eval().to("cpu" if device == "meta" else device)

    def examples(self) -> Examples:
        """Read, check, deduplicate and split what the user's adapter yields, and run the model on some of it.

        Raises
        ------
        SpecError
            If the user's code fails, or its output is not one number per example.
        DataError
            If an example cannot be used, there are fewer than declared, or splits overlap.
        """
        examples = split_own(self.data, self.seed, f"{self.model.adapter}.examples", self._read)
        self._refuse_failing(examples)
        return examples

    def query_reader(self) -> QueryReader:
        """Return what makes examples of records as the user's adapter yields them; nothing of them is cut."""

        def read(records: Sequence[Mapping[str, Any]], *, truncate: bool) -> list[Example]:
            del truncate
            return own_queries(records, self.data, self.seed, f"{self.model.adapter}.examples")

        return read

    def outputs(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return what the user's ``output`` makes of a batch [B]."""
        import torch

        parameter = next(model.parameters())
        batch = stack(examples, parameter.device, parameter.dtype)
        more = f" and {len(examples) - 1} more" if len(examples) > 1 else ""
        with self._explained(f"output on {examples[0].example_id} of {examples[0].source}{more}"):
            output = self._task.output(model, batch)
        if not isinstance(output, torch.Tensor) or output.shape != (len(examples),) or not output.is_floating_point():
            tensor = isinstance(output, torch.Tensor)
            found = f"{output.dtype} of shape {list(output.shape)}" if tensor else type(output).__name__
            raise SpecError(
                f"model.adapter: {self.model.adapter}.output returned {found} for {len(examples)} examples; it must return "
                f"one floating-point number for each, of shape [{len(examples)}]."
            )
        return output

    def identity(self) -> dict[str, Any]:
        """Return the function, its arguments, and its version or the hash of the file that it is in."""
        task, name = self._task, self.model.adapter
        version = getattr(task, "version", None)
        if version is None:
            found = code_hash(name)
            if found is None:
                raise SpecError(
                    f"model.adapter: {name} was not read from a file that could be hashed. Give what it returns an attribute "
                    'version, such as "1", and change it whenever the code computes something else.'
                )
            code = {"code": found}
        elif isinstance(version, str | int):
            code = {"version": str(version)}
        else:
            raise SpecError(f"model.adapter: version of {name} is {version!r:.80}; accepted: a string or an integer.")
        return {"adapter": name, "arguments": content_hash(self._arguments()), "output": OUTPUT, **code}

    def output_heads(self, model: nn.Module) -> tuple[str, ...]:
        """Return nothing: what is left out is chosen in run.toml, features.groups.exclude."""
        return ()

    def longest(self, split: str) -> None:
        """Return None: the examples tell."""

    @cached_property
    def _task(self) -> OwnTask:
        name, arguments = self.model.adapter, self._arguments()
        function = find_function(name, "model.adapter")
        given = ", ".join(f"{key} = {value!r}" for key, value in arguments.items())
        with users_code(f"model.adapter: {name}({given})", name, _MEND):
            task: OwnTask = function(**arguments)
        if missing := [method for method in _METHODS if not callable(getattr(task, method, None))]:
            raise SpecError(
                f"model.adapter: {name} returned {type(task).__name__}, which has no method {', '.join(missing)}; it must "
                f"return an object with {', '.join(_METHODS)}."
            )
        return task

    def _arguments(self) -> dict[str, Any]:
        kinds = {self.model.adapter: OwnOptions}
        return resolve_kind(kinds, self.model.adapter, self.model.options, "model.options").arguments or {}

    def _explained(self, call: str) -> AbstractContextManager[None]:
        return users_code(f"model.adapter: {self.model.adapter}.{call}", self.model.adapter, _MEND)

    def _read(self, source: str, split: str) -> Iterator[Any]:
        """What the user's adapter yields, with each step into its code explained."""

        def explained(done: int) -> AbstractContextManager[None]:
            return self._explained(f"examples({source!r}), for {key_of(split)}, after {done:,} examples,")

        with explained(0):
            given = iter(self._task.examples(source))
        done = 0
        while True:
            with explained(done):
                item = next(given, given)
            # The iterator itself stands for its end: no example is that.
            if item is given:
                return
            done += 1
            yield item

    def _refuse_failing(self, examples: Examples) -> None:
        """Have the model put out something for an example of every split, before any cluster starts."""
        import torch

        model = self.load("cpu")
        with torch.no_grad():
            self.outputs(model, [rows[0] for rows in examples.splits.values()])


def stack(examples: Sequence[Example], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return every input of a batch by its name: [B, ...], with zeros behind those that are shorter in the first dimension.

    Beside each input that has dimensions stands ``<name>_mask`` [B, T]: True where the first dimension is no padding.
    Floating-point numbers come in ``dtype``, integers as int64, booleans as booleans.
    """
    import torch

    batch: dict[str, Tensor] = {}
    for name, first in examples[0].inputs.items():
        arrays = [example.inputs[name] for example in examples]
        if first.ndim == 0:
            stacked = np.stack(arrays)
        else:
            lengths = np.array([len(array) for array in arrays])
            stacked = np.zeros((len(arrays), lengths.max(), *first.shape[1:]), first.dtype)
            for row, array in zip(stacked, arrays, strict=True):
                row[: len(array)] = array
            batch[name + MASK] = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None]).to(device)
        if stacked.dtype.kind in "iu":
            stacked = stacked.astype(np.int64)
        tensor = torch.from_numpy(stacked).to(device)
        batch[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return batch
