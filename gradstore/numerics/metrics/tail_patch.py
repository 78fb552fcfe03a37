"""Tail-patch: what one optimizer step on a query's proponents does to the query."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradstore.errors import DataError, SpecError

Example = TypeVar("Example")


def tail_patch(
    model: nn.Module,
    outputs: Callable[[nn.Module, Sequence[Example]], Float[Tensor, " B"]],
    query: Example,
    proponents: Sequence[Example],
    *,
    optimizer: str,
    learning_rate: float,
) -> float:
    r"""Relative change, in percent, of a query's log-probability after one optimizer step on its proponents.

    .. math:: 100 \, (\log p_{after} - \log p_{before}) / |\log p_{before}|

    The step is on the mean over proponents of their summed token losses, over every parameter, by a fresh optimizer
    without weight decay. The model is restored bit by bit, also after an error.

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
        A key of `OPTIMIZERS`.
    learning_rate
        Of the one step.

    Raises
    ------
    SpecError
        If the optimizer is unknown.
    DataError
        If there is no proponent, or the query's log-probability is zero or not finite before or after.
    """
    if optimizer not in OPTIMIZERS:
        raise SpecError(f"score.tail_patch.optimizer: found {optimizer!r}; accepted: {', '.join(OPTIMIZERS)}.")
    if not proponents:
        raise DataError("tail-patch: the query has no proponents to train on.")
    before = _log_probability(model, outputs, query)
    with _restored(model) as parameters:
        torch.autograd.backward(outputs(model, proponents).mean())
        for parameter in parameters:
            # One optimizer per tensor, which changes nothing elementwise, holds the moments of one tensor at a time.
            OPTIMIZERS[optimizer]([parameter], learning_rate).step()
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
def _restored(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Every floating-point parameter, open to training; values, gradients and flags are put back afterwards."""
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    saved = [(parameter.detach().clone(), parameter.grad, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(True)
        yield parameters
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
