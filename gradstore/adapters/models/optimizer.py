"""The state of an Adam optimizer, as torch saves it: what the gradients of its parameters are divided by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gradstore.adapters.models.modules import read_tensors_only
from gradstore.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

_KEY = "model.optimizer"


def read_divisors(file: str, model: nn.Module) -> dict[str, Tensor]:
    r"""Return, for every parameter that the optimizer has stepped, the divisor of Adam's direction, by its name.

    .. math:: \sqrt{v / (1 - \beta_2^t)} + \epsilon

    v is ``exp_avg_sq`` after t steps, or with amsgrad the largest that it was; beta_2 and epsilon are those of the parameter's group. The file is what
    ``torch.save(optimizer.state_dict(), file)`` writes. Parameters are found by the names that torch keeps where the
    optimizer was made from ``model.named_parameters()``; without names, a single group must hold the model's parameters that
    require a gradient, in their order.

    Raises
    ------
    SpecError
        If there is no such file.
    DataError
        If it is no state of Adam, or not one of this model.
    """
    divisors = {}
    for name, (group, entry) in read_adam(file, model).items():
        beta2, epsilon = _settings(file, group)
        moment = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        divisors[name] = _root(file, name, entry, (moment, beta2)) + epsilon
    return divisors


def read_adam(file: str, model: nn.Module) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return, for every parameter that the optimizer has stepped, the settings of its group and its moments; see `read_divisors`.

    Raises
    ------
    SpecError
        If there is no such file.
    DataError
        If it is no state of an optimizer, or not one of this model.
    """
    state = read_tensors_only(file, _KEY)
    groups, moments = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(moments, Mapping):
        raise DataError(
            f"{_KEY}: {file} holds {', '.join(map(str, state))[:200]}, not an optimizer's state. "
            "Save optimizer.state_dict() with torch.save."
        )
    parameters = dict(model.named_parameters())
    found = {}
    for group, names in zip(groups, _names(file, groups, parameters), strict=True):
        _settings(file, group)
        for number, name in zip(group["params"], names, strict=True):
            entry = moments.get(number)
            if entry is None or float(entry.get("step", 1)) == 0:
                continue
            _refuse_strange(file, name, entry, parameters)
            found[name] = group, entry
    if not found:
        raise DataError(f"{_KEY}: {file} has stepped no parameter yet. Save it after training.")
    return found


def _names(
    file: str, groups: Sequence[Mapping[str, Any]], parameters: Mapping[str, nn.Parameter]
) -> list[Sequence[str]]:
    """The names of the parameters of every group."""
    if all("param_names" in group for group in groups):
        return [group["param_names"] for group in groups]
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if len(groups) != 1 or len(groups[0]["params"]) != len(trained):
        counts = ", ".join(str(len(group["params"])) for group in groups)
        raise DataError(
            f"{_KEY}: {file} has {len(groups)} groups of {counts} parameters without names, the model {len(trained)} that "
            "are trained, so which is which is not known. Make the optimizer from model.named_parameters(), or add "
            "param_names to its groups before it is saved."
        )
    return [trained]


def _settings(file: str, group: Mapping[str, Any]) -> tuple[float, float]:
    """(beta_2, epsilon) of a group."""
    if "betas" not in group or "eps" not in group:
        raise DataError(
            f"{_KEY}: a group of {file} has no betas and eps, so it is of another optimizer than Adam or AdamW "
            f"(it has {', '.join(map(str, group))[:200]}). Leave model.optimizer out."
        )
    return float(group["betas"][1]), float(group["eps"])


def _refuse_strange(file: str, name: str, entry: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
    """Make sure that an entry holds Adam's second moment of a parameter of the model."""
    import torch

    moment = entry.get("exp_avg_sq")
    if not isinstance(moment, torch.Tensor) or "step" not in entry:
        raise DataError(f"{_KEY}: {file} has no exp_avg_sq and step of {name}. Name a state of Adam or AdamW.")
    if name not in parameters or moment.shape != parameters[name].shape:
        held = list(parameters[name].shape) if name in parameters else "no such parameter"
        raise DataError(
            f"{_KEY}: {file} has {name} {list(moment.shape)}, the model {held}. Name the optimizer's state of this model."
        )


def _root(file: str, name: str, entry: Mapping[str, Any], second_moment: tuple[str, float]) -> Tensor:
    """The root of a parameter's second moment, whose (key, beta_2) are given, corrected for its start at zero."""
    import torch

    key, beta2 = second_moment
    moment = entry.get(key)
    if not isinstance(moment, torch.Tensor):
        raise DataError(f"{_KEY}: {file} has no {key} of {name}. Name a state of Adam or AdamW.")
    corrected: Tensor = moment.double() / (1 - beta2 ** float(entry["step"]))
    return torch.sqrt(corrected).float()
