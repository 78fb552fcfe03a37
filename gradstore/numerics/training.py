"""Training a model on some examples: what LDS and mislabel detection need again and again, and nothing more."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradstore.errors import DataError
from gradstore.numerics.generator import derive_key, permutation, words

Example = TypeVar("Example")
Losses = Callable[[nn.Module, Sequence[Example]], Float[Tensor, " B"]]

_SCHEDULES: Final[dict[str, Callable[[float], float]]] = {
    "constant": lambda _: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How a model is trained.

    Attributes
    ----------
    epochs, batch
        Passes over the examples, and examples of a step; the last batch of a pass is dropped if it is not whole.
    optimizer
        AdamW, or SGD with ``momentum``.
    learning_rate, schedule
        Of the first step, and how it falls to nearly 0 by the last: not at all, or along a line or a cosine.
    weight_decay, momentum
        As torch's optimizers have them.
    """

    epochs: int = 10
    batch: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    weight_decay: float = 0.0
    momentum: float = 0.9


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Enter with torch's generator at a seed; it is put back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def train(
    model: nn.Module, losses: Losses[Example], examples: Sequence[Example], settings: TrainingSettings, *, seed: int
) -> None:
    """Train a model in place on the mean loss of each batch, in training mode; it is left in evaluation mode.

    Passes take the examples in orders that are derived from the seed; what else is random, such as dropout, follows torch's
    generator, which is seeded and put back.

    Parameters
    ----------
    model
        As it is to begin.
    losses
        Loss of each of some examples.
    examples
        What it is trained on.
    settings
        How.
    seed
        Of the orders and of what is random.

    Raises
    ------
    DataError
        If there are no examples, or a loss is not finite.
    """
    if not examples:
        raise DataError("training: found no examples to train on.")
    size = min(settings.batch, len(examples))
    steps = settings.epochs * (len(examples) // size)
    optimizer = _optimizer(model, settings)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _SCHEDULES[settings.schedule](step / steps))
    model.train()
    with seeded(derive_key(seed, "training", "random") % 2**63):
        for epoch in range(settings.epochs):
            order = permutation(words(derive_key(seed, "training", f"epoch {epoch}"), len(examples))).tolist()
            for first in range(0, len(order) - size + 1, size):
                loss = losses(model, [examples[place] for place in order[first : first + size]]).mean()
                if not math.isfinite(loss.item()):
                    raise DataError(
                        f"training: the loss is {loss.item()} in epoch {epoch + 1}. Lower the learning rate, {settings.learning_rate}."
                    )
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                falling.step()
    model.eval()


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
