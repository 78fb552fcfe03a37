"""Tail-patch: what one optimizer step on a query's proponents does to the query."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradstore.errors import DataError, SpecError

Example = TypeVar("Example")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdamState:
    """What Adam or AdamW, as torch saves it, has of one parameter.

    Attributes
    ----------
    settings
        Those of the parameter's group: betas, eps, weight_decay, and others but the learning rate.
    moments
        step, exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq.
    """

    settings: Mapping[str, Any]
    moments: Mapping[str, Any]

    def optimizer(self, parameter: nn.Parameter, learning_rate: float) -> torch.optim.Optimizer:
        """Make the optimizer of this one parameter as it was when it was saved, but for the learning rate."""
        # Older states do not say whether the decay was decoupled; AdamW's is.
        settings = {key: self.settings[key] for key in ("betas", "eps", "weight_decay") if key in self.settings}
        amsgrad = bool(self.settings.get("amsgrad", False))
        decoupled = bool(self.settings.get("decoupled_weight_decay", True))
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        optimizer = kind([parameter], lr=learning_rate, amsgrad=amsgrad, **settings)
        state = {
            name: value.detach().clone() if isinstance(value, Tensor) else torch.tensor(float(value))
            for name, value in self.moments.items()
        }
        optimizer.state[parameter] = {
            name: value if name == "step" else value.to(parameter.device, parameter.dtype)
            for name, value in state.items()
        }
        return optimizer


def tail_patch(
    model: nn.Module,
    outputs: Callable[[nn.Module, Sequence[Example]], Float[Tensor, " B"]],
    query: Example,
    proponents: Sequence[Example],
    *,
    optimizer: str | Mapping[str, AdamState],
    learning_rate: float,
) -> float:
    r"""Relative change, in percent, of a query's log-probability after one optimizer step on its proponents.

    .. math:: 100 \, (\log p_{after} - \log p_{before}) / |\log p_{before}|

    The step is on the mean over proponents of their summed token losses: over every parameter by a fresh optimizer without weight
    decay, or by the one that trained the model, over the parameters that it has. The model is restored bit by bit, also after an
    error.

    Parameters
    ----------
    model
        In evaluation mode.
    outputs
        The summed token loss, minus the log-probability, of each of some examples.
    query
        The example whose log-probability is measured.
    proponents
        The examples of the one batch that is trained on.
    optimizer
        A key of `OPTIMIZERS`; or, by parameter, the state of the optimizer that trained the model.
    learning_rate
        Of the one step.

    Raises
    ------
    SpecError
        If the optimizer is unknown.
    DataError
        If there is no proponent, or the query's log-probability is zero or not finite before or after.
    """
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise SpecError(f"score.tail_patch.optimizer: found {optimizer!r}; accepted: {', '.join(OPTIMIZERS)}.")
    if not proponents:
        raise DataError("tail-patch: the query has no proponents to train on.")
    before = _log_probability(model, outputs, query)
    with _restored(model) as parameters:
        torch.autograd.backward(outputs(model, proponents).mean())
        for name, parameter in parameters.items():
            # One optimizer per tensor, which changes nothing elementwise, holds the moments of one tensor at a time.
            if isinstance(optimizer, str):
                OPTIMIZERS[optimizer]([parameter], learning_rate).step()
            elif name in optimizer:
                optimizer[name].optimizer(parameter, learning_rate).step()
            parameter.grad = None
        after = _log_probability(model, outputs, query)
    if before == 0 or not math.isfinite(before) or not math.isfinite(after):
        raise DataError(
            f"tail-patch: the query's log-probability is {before} before the step and {after} after it, so its "
            "relative change has no value. Lower the learning rate, or leave out this query."
        )
    return 100 * (after - before) / abs(before)


def _log_probability(
    model: nn.Module, outputs: Callable[[nn.Module, Sequence[Example]], Float[Tensor, " B"]], query: Example
) -> float:
    # Where the caller has opened autocast, it keeps rounded weights: those before the step would be used after it, and
    # those made here, without gradient, in the step itself.
    torch.clear_autocast_cache()
    with torch.no_grad():
        log_probability = -float(outputs(model, [query]))
    torch.clear_autocast_cache()
    return log_probability


@contextmanager
def _restored(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Every floating-point parameter by its name, open to training; values, gradients and flags are put back afterwards."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    parameters = [*named.values()]
    saved = [(parameter.detach().clone(), parameter.grad, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        yield named
    finally:
        with torch.no_grad():
            for parameter, (value, gradient, requires_grad) in zip(parameters, saved, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient


def _adamw(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)


def _sgd(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=learning_rate)


OPTIMIZERS = {"adamw": _adamw, "sgd": _sgd}
