"""Trainers: what makes a model of some train examples, a shipped one or a user's own ``module:function``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np

from gradstore.adapters.locations import resolve_location
from gradstore.adapters.models.functions import code_hash, find_function, users_code
from gradstore.adapters.models.modules import is_function
from gradstore.adapters.protocol import Adapter
from gradstore.errors import SpecError
from gradstore.spec import content_hash, resolve_kind
from gradstore.store.examples import Example

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradstore.numerics.training import TrainingSettings

SCRATCH: Final = "scratch"
FINE_TUNE: Final = "fine_tune"
AIRREP: Final = "airrep"
"""The trainer of an encoder of texts, which only `gradstore train` has: it learns from models that others have trained."""

_SHIPPED: Final = (SCRATCH, FINE_TUNE)
_KEY: Final = "training"
_BATCH: Final = 64


@runtime_checkable
class Untrained(Protocol):
    """An adapter whose model can be made anew, as it is before any training."""

    def fresh(self, seed: int, device: str) -> nn.Module:
        """Return the model with random parameters that the seed determines."""
        ...

    def losses(self, model: nn.Module, examples: Sequence[Example]) -> Tensor:
        """Return what training brings down, for each example [B], differentiable."""
        ...


@runtime_checkable
class TrainsAlone(Protocol):
    """An adapter whose train examples can be read without those of other splits, which the model is to make."""

    def training_examples(self) -> Sequence[Example]:
        """Return the examples of data.train, in row order."""
        ...


@runtime_checkable
class Saved(Protocol):
    """An adapter that can keep a model which was trained, so that ``load`` finds it."""

    def saved_place(self) -> Path:
        """Return the file or folder that [model] names for it; SpecError if it names none, or none that can be written."""
        ...

    def save(self, model: nn.Module, place: Path) -> None:
        """Write a model to a place of that kind."""
        ...


class Trainer(Protocol):
    """Makes a model of train examples: the same one for the same examples and seed."""

    def __call__(self, adapter: Adapter, examples: Sequence[Example], *, seed: int, device: str) -> nn.Module:
        """Return the model in evaluation mode."""
        ...


def resolve_trainer(name: str, options: Mapping[str, Any]) -> Trainer:
    """Return a trainer by its name, ``scratch``, ``fine_tune`` or ``module:function``, as [training] names it.

    ``scratch`` trains from random parameters, and ``fine_tune`` from those that the adapter loads, by the settings of
    `gradstore.numerics.training.TrainingSettings`. A function is called with the adapter, the examples, ``seed``, ``device`` and
    the options by name, and returns the model.

    Raises
    ------
    SpecError
        If there is no such trainer, or an option is unknown or of the wrong type.
    """
    if name in _SHIPPED:
        from gradstore.numerics.training import TrainingSettings

        settings = resolve_kind({name: TrainingSettings}, name, dict(options), f"{_KEY}.options")
        return _Shipped(name, settings)
    if not is_function(name):
        raise SpecError(
            f"{_KEY}.trainer: found {name!r}; accepted: {', '.join(_SHIPPED)}, {AIRREP} of `gradstore train` with a text_encoder, or "
            "a function of yours, package.module:function."
        )
    return _Own(name, find_function(name, f"{_KEY}.trainer"), dict(options))


def trainer_settings(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells models of two trainers apart: name, options, and a hash of the file that a user's own is in."""
    code = None
    if name not in _SHIPPED:
        find_function(name, f"{_KEY}.trainer")
        code = code_hash(name)
    return {"trainer": name, "options": dict(options), "code": code}


def hash_of_base(base: str | None) -> str | None:
    """Return a hash of the files of training.base, or of a hub id or function: a folder may be elsewhere on another machine."""
    if base is None:
        return None
    place = Path(resolve_location(base, f"{_KEY}.base"))
    files = sorted(file for file in (place, *place.rglob("*")) if file.is_file())
    if not files:
        return content_hash(base)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as opened:
            digest.update(
                f"{file.relative_to(place)}|{hashlib.file_digest(opened, hashlib.blake2b).hexdigest()}|".encode()
            )
    return digest.hexdigest()


def outputs_of(adapter: Adapter, model: nn.Module, examples: Sequence[Example]) -> np.ndarray:
    """Return f of every example, float64 [n], some at a time."""
    import torch

    found = np.empty(len(examples))
    with torch.no_grad():
        for first in range(0, len(examples), _BATCH):
            of_batch = adapter.outputs(model, examples[first : first + _BATCH])
            found[first : first + _BATCH] = of_batch.double().cpu().numpy()
    return found


class _Shipped:
    """Trains the model of an adapter, made anew or as it loads."""

    def __init__(self, name: str, settings: TrainingSettings) -> None:
        self._name, self._settings = name, settings

    def __call__(self, adapter: Adapter, examples: Sequence[Example], *, seed: int, device: str) -> nn.Module:
        from gradstore.numerics.training import train

        if not isinstance(adapter, Untrained):
            raise SpecError(
                f"{_KEY}.trainer: found {self._name!r}, and {type(adapter).__name__} does not say how its model is made anew. Name a "
                "function of yours, package.module:function."
            )
        model = adapter.fresh(seed, device) if self._name == SCRATCH else adapter.load(device)
        train(model, adapter.losses, examples, self._settings, seed=seed)
        return model


class _Own:
    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._name, self._function, self._options = name, function, options

    def __call__(self, adapter: Adapter, examples: Sequence[Example], *, seed: int, device: str) -> nn.Module:
        from torch import nn

        with users_code(
            f"{_KEY}.trainer: {self._name} of {len(examples):,} examples",
            self._name,
            f"Mend the function, or {_KEY}.options.",
        ):
            made = self._function(adapter, examples, seed=seed, device=device, **self._options)
        if not isinstance(made, nn.Module):
            raise SpecError(
                f"{_KEY}.trainer: {self._name} returned {type(made).__name__}; it must return a torch.nn.Module."
            )
        return made.eval()
