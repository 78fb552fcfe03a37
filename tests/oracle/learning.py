"""The learner, scores, and what they are judged by."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray


def scores(c: Array, weights: Array) -> Array:
    """S[q, n] = sum over groups of w_j C[q, n, j]."""
    total = np.zeros(c.shape[:2])
    for j, weight in enumerate(weights):
        total += weight * c[:, :, j].astype(np.float64)
    return total


def top(scores_n: Array, k: int) -> list[int]:
    """Rows of the k highest scores, best first, the earlier row first among equals."""
    return sorted(range(len(scores_n)), key=lambda row: (-scores_n[row], row))[:k]


def loss(
    c_nm: Tensor,
    raw: Tensor,
    k: int,
    *,
    square: bool = False,
    objective: str = "top",
    positives: Sequence[int] = (),
) -> Tensor:
    """Algorithm 1's loss of one query, differentiable in w_raw; of |S| where scores are squared in the end."""
    score: Tensor = c_nm @ torch.softmax(raw, 0)
    score = score.abs() if square else score
    highest, lowest = top(score.detach().numpy(), k), top(-score.detach().numpy(), k)
    if objective != "unnormalized":
        score = score / torch.linalg.norm(score)
    if objective == "pairs":
        return -torch.mean(score[list(positives)])
    if objective == "bottom":
        return torch.mean(score[lowest])
    if objective == "gap":
        return torch.mean(score[lowest]) - torch.mean(score[highest])
    return -torch.mean(score[highest])


def learn(
    c: Array,
    raw: Array,
    visits: Sequence[tuple[int, int]],
    *,
    k: int,
    learning_rate: float,
    weight_decay: float,
    square: bool = False,
    objective: str = "top",
    positives: Sequence[Sequence[int]] | None = None,
) -> tuple[Array, list[float]]:
    """Algorithm 1 on a dense C [Q, N, M], by autograd and torch's own optimizer and schedule; w and every loss."""
    parameter = nn.Parameter(torch.tensor(raw, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=learning_rate, weight_decay=weight_decay)
    # A schedule that is stepped without the optimizer (a query of zero norm) warns, so the rates are computed first.
    rates = [learning_rate * (1 + math.cos(math.pi * step / len(visits))) / 2 for step in range(len(visits))]
    losses = []
    for (_, query), rate in zip(visits, rates, strict=True):
        c_nm = torch.tensor(c[query], dtype=torch.float64)
        given = () if positives is None else positives[query]
        if not (c_nm @ torch.softmax(parameter.detach(), 0)).any() or (positives is not None and not len(given)):
            losses.append(math.nan)
            continue
        value = loss(c_nm, parameter, k, square=square, objective=objective, positives=given)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(value.item())
    return torch.softmax(parameter.detach(), 0).numpy(), losses


def full_batch(
    c: Array,
    raw: Array,
    k: int,
    weight_decay: float,
    *,
    square: bool = False,
    objective: str = "top",
    positives: Sequence[Sequence[int]] | None = None,
) -> float:
    """All queries' losses over the size of those of uniform weights, and the decay times half the variance of log w."""

    def losses(at: Array) -> float:
        total = 0.0
        for query, c_nm in enumerate(c.astype(np.float64)):
            given = () if positives is None else positives[query]
            if c_nm.any() and (positives is None or len(given)):
                value = loss(
                    torch.tensor(c_nm), torch.tensor(at), k, square=square, objective=objective, positives=given
                )
                total += value.item()
        return total

    middle = math.fsum(raw) / len(raw)
    variance = math.fsum((value - middle) ** 2 for value in raw) / len(raw)
    return losses(raw) / (abs(losses(np.zeros(len(raw)))) or 1.0) + weight_decay / 2 * variance


def closed_form(c: Array, k: int, *, square: bool = False) -> Array:
    """Of every group max(0, mean of the top k rows) over the mean square, each query divided by its norm; sums to 1."""
    groups = c.shape[2]
    signal, noise = [0.0] * groups, [0.0] * groups
    for c_nm in c.astype(np.float64):
        score = [math.fsum(row) / groups for row in c_nm]
        norm = math.sqrt(math.fsum(value * value for value in score))
        if norm == 0:
            continue
        best = top(np.abs(score) if square else np.array(score), k)
        for j in range(groups):
            signs = [math.copysign(1.0, score[n]) if square else 1.0 for n in best]
            signal[j] += math.fsum(sign * c_nm[n, j] for sign, n in zip(signs, best, strict=True)) / norm / k
            noise[j] += math.fsum(value * value for value in c_nm[:, j]) / norm**2 / len(c_nm)
    weights = [max(0.0, a) / b if b > 0 else 0.0 for a, b in zip(signal, noise, strict=True)]
    total = math.fsum(weights)
    return np.array([weight / total if total else 1 / groups for weight in weights])


def judged(c: Array, weights: Array, k: int, queries: Sequence[int], *, square: bool = False) -> float:
    """Mean over some queries of the mean of the top k scores over the norm of all; of |S| where they are squared."""
    found = []
    for score in scores(c[list(queries)], weights):
        placing = np.abs(score) if square else score
        norm = math.sqrt(math.fsum(float(value) ** 2 for value in score))
        mean = math.fsum(float(placing[n]) for n in top(placing, k)) / k
        found.append(mean / norm if norm else 0.0)
    return math.fsum(found) / len(found)


def tail_patch(
    model: nn.Module,
    output: Callable[[nn.Module, Sequence[object]], Tensor],
    query: object,
    proponents: Sequence[object],
    make_optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
) -> float:
    """Relative change in percent of the query's log-probability, on a copy of the model that is stepped once."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before = -output(model, [query]).item()
    total = sum((output(model, [proponent]).sum() for proponent in proponents), torch.zeros(()))
    torch.autograd.backward(total / len(proponents))
    make_optimizer(model.parameters()).step()
    after = -output(model, [query]).item()
    return 100 * (after - before) / abs(before)


def linear_datamodeling_scores(scores_qn: Array, subsets: Sequence[Sequence[int]], actual_sq: Array) -> list[float]:
    """For every query, the rank correlation over subsets of summed scores and outputs; NaN where either is constant."""
    found = []
    for q, scores_n in enumerate(scores_qn):
        predicted = [math.fsum(float(scores_n[n]) for n in subset) for subset in subsets]
        first, second = ranks(predicted), ranks([float(outputs_q[q]) for outputs_q in actual_sq])
        middle = (len(subsets) + 1) / 2
        product = math.fsum((a - middle) * (b - middle) for a, b in zip(first, second, strict=True))
        squares = [math.fsum((rank - middle) ** 2 for rank in side) for side in (first, second)]
        found.append(product / math.sqrt(squares[0] * squares[1]) if min(squares) > 0 else math.nan)
    return found


def ranks(values: Sequence[float]) -> list[float]:
    """For each value one more than how many are smaller, plus half of how many others are equal."""
    return [
        1 + sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]
