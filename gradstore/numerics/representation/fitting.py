"""Training an encoder to rank subsets as models do that were trained on them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gradstore.errors import DataError, SpecError
from gradstore.numerics.generator import derive_key, permutation, words
from gradstore.numerics.metrics import ranking_accuracy
from gradstore.numerics.representation.model import Representation, padded
from gradstore.numerics.representation.pooling import attention_pool
from gradstore.numerics.representation.ranking import ranking_loss

_BATCH: Final = 32
_START: Final = "start"
_BEST: Final = "best"
_ACCURACY: Final = "accuracy"
# Learning rate of the encoder's own layers, in parts of that of the linear layer.
_OWN: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class FittingSettings:
    """How an encoder is trained.

    Attributes
    ----------
    layers
        Its last layers that are trained beside the linear layer on what is pooled; of none of them states are computed once.
    epochs, patience
        Passes over the queries at most, and how many without a better accuracy on what is held out end it.
    queries, subsets
        Of one step.
    learning_rate, weight_decay
        Of AdamW, of the linear layer in parts of its size at the start, towards which it decays; the encoder's own layers, whose
        size is theirs, learn at a tenth of the rate and do not decay.
    sharpness
        Mean square of the norm of representations at the start: how much of its attention a query pays to its nearest.
    held_out
        Share of the queries, and of the subsets, that are not trained on, by which the best epoch is chosen.
    """

    layers: int = 0
    epochs: int = 60
    patience: int = 10
    queries: int = 16
    subsets: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    sharpness: float = 5.0
    held_out: float = 0.2

    def __post_init__(self) -> None:
        """Refuse numbers that nothing can be trained with."""
        least = {"layers": 0, "epochs": 1, "patience": 1, "queries": 1, "subsets": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise SpecError(f"training.options.{name}: found {getattr(self, name)}; accepted: at least {bound}.")
        for name in ("learning_rate", "sharpness"):
            if not getattr(self, name) > 0:
                raise SpecError(f"training.options.{name}: found {getattr(self, name)}; accepted: a number above 0.")
        if not self.weight_decay >= 0:
            raise SpecError(f"training.options.weight_decay: found {self.weight_decay}; accepted: at least 0.")
        if not 0 < self.held_out < 1:
            raise SpecError(f"training.options.held_out: found {self.held_out}; accepted: a share between 0 and 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What there is to learn from.

    Attributes
    ----------
    texts
        Tokens of every text: first of the examples, then of the queries.
    subsets
        [S, n]: numbers of the examples of every subset.
    outcomes
        [Q, S]: what the model trained on each subset outputs for every query, larger is better.
    """

    texts: Sequence[Int64[np.ndarray, " _"]]
    subsets: Int64[np.ndarray, "S n"]
    outcomes: Float[np.ndarray, "Q S"]

    @property
    def examples(self) -> int:
        """How many of the texts are examples."""
        return len(self.texts) - len(self.outcomes)


@dataclass(slots=True, kw_only=True)
class Fitted:
    """How far a training has come.

    Attributes
    ----------
    accuracies
        Ranking accuracy of what is held out: at the start, and after every epoch.
    best
        The epoch of the highest, 0 for the start.
    tensors
        What was trained, as it is and as it was at its best, and the state of the optimizer; and the accuracy of every held-out
        query at the start and at its best, NaN of one whose outcomes are equal.
    """

    accuracies: list[float] = field(default_factory=list)
    best: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def ended(self, settings: FittingSettings) -> bool:
        """Whether no epoch follows."""
        epochs = len(self.accuracies) - 1
        return epochs >= settings.epochs or epochs - self.best >= settings.patience

    def gains(self) -> list[float]:
        """By how much the accuracy of held-out queries is higher at its best than at the start, of those that have one."""
        found: list[float] = (self.tensors[f"{_BEST}.{_ACCURACY}"] - self.tensors[f"{_START}.{_ACCURACY}"]).tolist()
        return [gain for gain in found if math.isfinite(gain)]


class Fitting:
    r"""Trains an encoder so that pooled scores order subsets as outcomes do.

    With Enc(x) = W h(x), h the pooled states and W beginning as a multiple of the identity, every step takes some queries and
    subsets and lowers the `ranking_loss` of

    .. math:: f(x, S) = \sum_{z \in S} \alpha_z \, \mathrm{Enc}(x) \cdot \mathrm{Enc}(z)

    pooled by attention (`attention_pool`; arXiv 2505.18513). Orders of queries and subsets follow from the seed and the
    epoch alone, so that a training that is taken up again goes on as it would have.

    Parameters
    ----------
    model
        The encoder; its linear layer is replaced, and what is trained of it changes.
    lesson
        What there is to learn from.
    settings, seed
        How, and what orders are derived from.

    Raises
    ------
    SpecError
        If the encoder has not so many layers.
    DataError
        If there are too few queries or subsets, or the outcomes of no held-out query, or no other, differ.
    """

    def __init__(self, model: Representation, lesson: Lesson, settings: FittingSettings, *, seed: int) -> None:
        self._model, self._lesson, self._settings, self._seed = model, lesson, settings, seed
        self._device = next(model.parameters()).device
        self._queries = _Split.draw(len(lesson.outcomes), settings.held_out, seed, "queries")
        self._subsets = _Split.draw(len(lesson.subsets), settings.held_out, seed, "subsets")
        for queries, subsets in ((self._queries.kept, self._subsets.kept), (self._queries.held, self._subsets.held)):
            outcomes = lesson.outcomes[np.ix_(queries, subsets)]
            if len(subsets) < 2 or not np.ptp(outcomes, axis=1).any():
                raise DataError(
                    f"training: found no pairs of subsets whose outcomes differ, among {len(subsets)} subsets and {len(queries)} queries. Make "
                    "the signal of more subsets, or train its models longer."
                )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._layers = _last_layers(model.encoder, settings.layers).requires_grad_(True)
        self._states: Tensor | None = None
        with torch.no_grad():
            states = self._all_states()
        if not settings.layers:
            self._states = states
        dense = model.dense if isinstance(model.dense, nn.Linear) else None
        start = torch.eye(states.shape[1], device=self._device) if dense is None else dense.weight.detach()
        start = start * (settings.sharpness / (states @ start.T).square().sum(1).mean()).sqrt()
        # Of the change the weight decays, not of the layer itself. Steps of AdamW are of one size whatever the encoder's states are.
        self._start, self._change = start, nn.Parameter(torch.zeros_like(start))

    def begin(self) -> Fitted:
        """Return what there is before the first epoch."""
        of_queries = self._accuracy()
        fitted = Fitted(accuracies=[float(np.nanmean(of_queries))])
        fitted.tensors[f"{_START}.{_ACCURACY}"] = torch.from_numpy(of_queries)
        self._keep(fitted, self._optimizer(), best=of_queries)
        return fitted

    def go_on(self, fitted: Fitted) -> Iterator[Fitted]:
        """Train on, and yield after every epoch how far it has come, until it has ended.

        Raises
        ------
        DataError
            If the loss is not finite.
        """
        optimizer = self._optimizer()
        self._take_up(fitted, optimizer)
        while not fitted.ended(self._settings):
            epoch = len(fitted.accuracies)
            for queries, subsets in self._batches(epoch):
                self._step(queries, subsets, optimizer)
            of_queries = self._accuracy()
            fitted.accuracies.append(float(np.nanmean(of_queries)))
            if better := fitted.accuracies[-1] > fitted.accuracies[fitted.best]:
                fitted.best = epoch
            self._keep(fitted, optimizer, best=of_queries if better else None)
            yield fitted

    def best(self, fitted: Fitted) -> Representation:
        """Return the encoder as it was at its best, with its linear layer."""
        named = {name: fitted.tensors[f"{_BEST}.{name}"] for name, _ in self._trained()}
        self._load(named)
        dense = nn.Linear(self._start.shape[1], self._start.shape[0], bias=False, device=self._device)
        with torch.no_grad():
            self._start = fitted.tensors[_START].to(self._device)
            dense.weight.copy_(self._linear())
        self._model.dense = dense.requires_grad_(False)
        # Lengths were trained too.
        self._model.reading = replace(self._model.reading, normalize=False)
        return self._model

    def _step(self, queries: np.ndarray, subsets: np.ndarray, optimizer: torch.optim.Optimizer) -> None:
        loss = ranking_loss(self._predicted(queries, subsets), self._outcomes(queries, subsets))
        if not bool(loss.isfinite()):
            raise DataError(f"training: the loss is {loss.item()}. Lower training.options.learning_rate or sharpness.")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()

    def _accuracy(self) -> Float[np.ndarray, " Q"]:
        """Ranking accuracy of held-out subsets for every held-out query."""
        queries, subsets = self._queries.held, self._subsets.held
        with torch.no_grad():
            predicted = self._predicted(queries, subsets).double().cpu().numpy()
        return ranking_accuracy(predicted, self._lesson.outcomes[np.ix_(queries, subsets)])

    def _predicted(self, queries: np.ndarray, subsets: np.ndarray) -> Float[Tensor, "q s"]:
        """Pooled scores of some queries and subsets, of whose examples alone there is need."""
        rows, places = np.unique(self._lesson.subsets[subsets], return_inverse=True)
        masks = np.zeros((len(subsets), len(rows)), bool)
        np.put_along_axis(masks, places.reshape(len(subsets), -1), True, axis=1)
        asked = self._represented(self._lesson.examples + queries)
        scores = asked @ self._represented(rows).T
        return attention_pool(scores, torch.from_numpy(masks).to(self._device))

    def _represented(self, places: np.ndarray) -> Float[Tensor, "n width"]:
        if self._states is not None:
            states = self._states[torch.from_numpy(places).to(self._device)]
        else:
            states = torch.cat([self._pooled_states(some) for some in _batched(places)])
        return states @ self._linear().T

    def _linear(self) -> Float[Tensor, "width states"]:
        """W: the start, and the change in units of the root mean square of its rows' lengths."""
        return self._start + self._start.square().sum(1).mean().sqrt() * self._change

    def _all_states(self) -> Float[Tensor, "n width"]:
        return torch.cat([self._pooled_states(some) for some in _batched(np.arange(len(self._lesson.texts)))])

    def _pooled_states(self, places: np.ndarray) -> Float[Tensor, "n width"]:
        tokens, mask = padded([self._lesson.texts[place] for place in places], self._device)
        return self._model.pooled_states(tokens, mask)

    def _outcomes(self, queries: np.ndarray, subsets: np.ndarray) -> Float[Tensor, "q s"]:
        return torch.from_numpy(self._lesson.outcomes[np.ix_(queries, subsets)]).to(self._device)

    def _batches(self, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        settings = self._settings
        order = self._queries.kept[self._order(f"queries of epoch {epoch}", len(self._queries.kept))]
        for number, first in enumerate(range(0, len(order), settings.queries)):
            drawn = self._order(f"subsets of epoch {epoch}, step {number}", len(self._subsets.kept))
            queries, subsets = order[first : first + settings.queries], self._subsets.kept[drawn[: settings.subsets]]
            # A few queries may have no two outcomes that differ: there is nothing in them to learn.
            if np.ptp(self._lesson.outcomes[np.ix_(queries, subsets)], axis=1).any():
                yield queries, subsets

    def _order(self, what: str, count: int) -> np.ndarray:
        return permutation(words(derive_key(self._seed, "airrep", what), count))

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [("change", self._change), *self._layers.named_parameters()]

    def _optimizer(self) -> torch.optim.AdamW:
        settings = self._settings
        return torch.optim.AdamW(
            [
                {"params": [self._change], "weight_decay": settings.weight_decay},
                {"params": [*self._layers.parameters()], "weight_decay": 0.0, "lr": _OWN * settings.learning_rate},
            ],
            lr=settings.learning_rate,
        )

    def _keep(self, fitted: Fitted, optimizer: torch.optim.Optimizer, *, best: Float[np.ndarray, " Q"] | None) -> None:
        """Put down what was trained, also as the best where the accuracy of held-out queries is given."""
        state: Mapping[int, Mapping[str, Tensor]] = optimizer.state_dict()["state"]
        fitted.tensors[_START] = self._start.detach().cpu()
        if best is not None:
            fitted.tensors[f"{_BEST}.{_ACCURACY}"] = torch.tensor(best)
        for place, (name, parameter) in enumerate(self._trained()):
            value = parameter.detach().cpu().clone()
            fitted.tensors[f"now.{name}"] = value
            if best is not None:
                fitted.tensors[f"{_BEST}.{name}"] = value.clone()
            fitted.tensors |= {
                f"adam.{key}.{name}": of.detach().cpu().clone() for key, of in state.get(place, {}).items()
            }

    def _take_up(self, fitted: Fitted, optimizer: torch.optim.Optimizer) -> None:
        tensors = fitted.tensors
        self._start = tensors[_START].to(self._device)
        self._load({name: tensors[f"now.{name}"] for name, _ in self._trained()})
        kept = optimizer.state_dict()
        kept["state"] = {
            place: found
            for place, (name, _) in enumerate(self._trained())
            if (
                found := {
                    key: tensors[at]
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if (at := f"adam.{key}.{name}") in tensors
                }
            )
        }
        optimizer.load_state_dict(kept)

    def _load(self, named: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._trained():
                parameter.copy_(named[name].to(self._device))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """Numbers that are trained on, and those that are held out; ascending."""

    kept: np.ndarray
    held: np.ndarray

    @classmethod
    def draw(cls, count: int, share: float, seed: int, what: str) -> "_Split":
        held = max(1, round(share * count))
        if held >= count:
            raise DataError(f"training: found {count} {what}, of which some are held out; accepted: at least 2.")
        places = permutation(words(derive_key(seed, "airrep", f"held-out {what}"), count))
        return cls(kept=np.flatnonzero(places >= held), held=np.flatnonzero(places < held))


def _batched(places: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(places), _BATCH):
        yield places[first : first + _BATCH]


def _last_layers(encoder: nn.Module, count: int) -> nn.ModuleList:
    """The last layers of an encoder: of the list of modules that is as long as it has hidden layers."""
    config: Any = encoder.config
    depth = int(config.num_hidden_layers)
    stacks: list[Any] = [
        module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if count > depth or (count and not stacks):
        found = f"the encoder has {depth}" if stacks else "the encoder's layers are in no list"
        raise SpecError(f"training.options.layers: found {count}; {found}. Train fewer, 0 for the linear layer alone.")
    return nn.ModuleList([*stacks[0]][depth - count :] if count else [])
