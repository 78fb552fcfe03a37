"""Models that a user's own function makes, and files of weights: imported, called, filled, and never unpickled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gradstore.adapters.locations import PACKAGE, resolve_location
from gradstore.adapters.models.functions import find_function, users_code
from gradstore.errors import DataError, SpecError
from gradstore.spec import ModelSection

if TYPE_CHECKING:
    from torch import Tensor, nn

_FUNCTION: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
SAFETENSORS: Final = ".safetensors"
TORCH_SUFFIXES: Final = (".pt", ".pth", ".bin")


def is_function(source: str) -> bool:
    """Whether a source is ``package.module:function`` (or a method of a class: ``module:Class.make``)."""
    return not source.startswith(PACKAGE) and _FUNCTION.fullmatch(source) is not None


def make_module(source: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Import a function, call it with named arguments, and return the module it makes, in float32.

    Raises
    ------
    SpecError
        If there is no such module or function, or it fails or returns something else.
    """
    from torch import nn

    function = find_function(source, "model.source")
    given = ", ".join(f"{name} = {value!r}" for name, value in arguments.items())
    advice = "Mend the function, or its arguments in model.options.arguments."
    with users_code(f"model.source: {source}({given})", source, advice):
        made = function(**arguments)
    if not isinstance(made, nn.Module):
        raise SpecError(f"model.source: {source} returned {type(made).__name__}; it must return a torch.nn.Module.")
    if any(parameter.is_meta for parameter in made.parameters()):
        raise SpecError(f"model.source: {source} returned a module without storage (on meta). Make it on the CPU.")
    return made.float()


def fill(module: nn.Module, weights: str) -> None:
    """Load a file of weights into a module, all of them and no others.

    Raises
    ------
    SpecError
        If there is no such file, or its name ends in neither .safetensors nor .pt, .pth or .bin.
    DataError
        If it is damaged, holds anything but tensors, or does not fit the module.
    """
    state = _read(weights)
    expected = module.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        raise DataError(
            f"model.weights: {weights} lacks {len(missing)} tensors of the model: {', '.join(missing[:5])}."
        )
    if unknown := sorted(state.keys() - expected.keys()):
        raise DataError(
            f"model.weights: {weights} has {len(unknown)} tensors that the model has not: {', '.join(unknown[:5])}."
        )
    for name, tensor in expected.items():
        if (found := state[name].shape) != tensor.shape:
            raise DataError(
                f"model.weights: {name} of {weights} is {list(found)}, the model's {list(tensor.shape)}. Name weights of "
                "this model, or mend model.options.arguments."
            )
    module.load_state_dict(dict(state))


class KeptInAFile:
    """An adapter's model as a file of weights, ``model.weights``: how it is written once it was trained."""

    __slots__ = ()
    model: ModelSection

    def saved_place(self) -> Path:
        """Return the file that ``model.weights`` names.

        Raises
        ------
        SpecError
            If it names none of safetensors.
        """
        weights = self.model.weights
        if weights is None or weights.startswith(PACKAGE) or Path(weights).suffix != SAFETENSORS:
            found = "is missing" if weights is None else f"found {weights!r}"
            raise SpecError(
                f"model.weights: {found}; accepted: a file {SAFETENSORS}, to which the trained model is written."
            )
        return Path(weights)

    def save(self, model: nn.Module, place: Path) -> None:
        """Write all tensors of a model to a file."""
        from safetensors.torch import save

        # Tensors that share memory, as tied ones do, are written each for itself.
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in model.state_dict().items()}
        place.write_bytes(save(tensors))


def _read(weights: str) -> dict[str, Tensor]:
    import torch

    state = read_tensors_only(weights, "model.weights")
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DataError(
            f"model.weights: {weights} holds {', '.join(map(str, state))[:200]}, not tensors by their names. "
            "Save model.state_dict() alone."
        )
    return {str(name): tensor for name, tensor in state.items()}


def read_tensors_only(file: str, key: str) -> dict[Any, Any]:
    """Read a file of tensors, safetensors' or torch's; a pickle that asks for any code is refused.

    Raises
    ------
    SpecError
        If there is no such file, or its name ends in neither .safetensors nor .pt, .pth or .bin.
    DataError
        If it is damaged, or asks for more than tensors and plain values.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(resolve_location(file, key))
    if path.suffix not in (SAFETENSORS, *TORCH_SUFFIXES):
        raise SpecError(
            f"{key}: found {file!r}; accepted: a file of tensors, {SAFETENSORS} or {', '.join(TORCH_SUFFIXES)}."
        )
    if not path.is_file():
        hint = " `gradstore train` writes one, as [training] says." if key == "model.weights" else ""
        raise SpecError(f"{key}: {file!r}: there is no such file.{hint}")
    try:
        state = (
            load_file(path) if path.suffix == SAFETENSORS else torch.load(path, map_location="cpu", weights_only=True)
        )
    except MemoryError:
        raise
    except (SafetensorError, Exception) as error:
        raise DataError(
            f"{key}: {file} cannot be read as tensors: {error}\nSave a state_dict() with torch.save, and copy it whole."
        ) from error
    if not isinstance(state, dict):
        raise DataError(f"{key}: {file} holds {type(state).__name__}, not a dictionary. Save a state_dict() alone.")
    return state
