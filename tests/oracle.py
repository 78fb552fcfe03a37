"""The whole pipeline once more: dense, in float64, with plain loops, sharing no code with gradstore.

Slow on purpose and meant to be read: it is where the expected values of the tests come from. Random draws (projection
matrices, the initial w_raw, the order of visits) are given to it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

Array = np.ndarray


def token_cross_entropy(logits: Array, tokens: Array, mask: Array) -> Array:
    """Sum over each row's counted tokens, but the first, of minus the log-probability that the logits give them."""
    rows, positions, _ = logits.shape
    losses = np.zeros(rows)
    for row in range(rows):
        for position in range(1, positions):
            if mask[row, position]:
                scores = logits[row, position - 1].astype(np.float64)
                highest = scores.max()
                log_total = highest + math.log(np.exp(scores - highest).sum())
                losses[row] += log_total - scores[tokens[row, position]]
    return losses


def gradient(model: nn.Module, output: Callable[[nn.Module], Tensor], names: Iterable[str]) -> dict[str, Array]:
    """Gradient [out, in] of one example's output with respect to the weight of every named module, by autograd."""
    model = copy.deepcopy(model).double()
    modules = [model.get_submodule(name) for name in names]
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    weights = [module.weight for module in modules]
    found = torch.autograd.grad(output(model).sum(), weights, allow_unused=True)  # type: ignore[arg-type]
    gradients = {}
    for name, module, weight, value in zip(names, modules, weights, found, strict=True):
        dense = np.zeros(tuple(weight.shape)) if value is None else value.numpy()
        gradients[name] = dense.T if type(module).__name__ == "Conv1D" else dense
    return gradients


def project_two_sided(gradient_oi: Array, output_matrix: Array, input_matrix: Array) -> Array:
    """P_o G P_i^T, flattened row by row, one inner product at a time."""
    features = np.zeros((len(output_matrix), len(input_matrix)))
    for a, output_row in enumerate(output_matrix.astype(np.float64)):
        for b, input_row in enumerate(input_matrix.astype(np.float64)):
            features[a, b] = output_row @ gradient_oi @ input_row
    return features.reshape(-1)


def precondition(train_nd: Array, query_qd: Array, *, kind: str, damping: float, mode: str) -> Array:
    """K psi of every query, with K built from the training features of the same group."""
    query_qd = query_qd.astype(np.float64)
    if kind == "identity":
        return query_qd
    gram = np.zeros((train_nd.shape[1], train_nd.shape[1]))
    for row in train_nd.astype(np.float64):
        gram += np.outer(row, row)
    if mode == "relative":
        damping = damping * np.trace(gram) / len(gram)
    if damping == 0:
        return np.zeros_like(query_qd)
    return np.linalg.solve(gram + damping * np.eye(len(gram)), query_qd.T).T


def contributions(queries: Mapping[str, Array], rows: Mapping[str, Array], groups: Sequence[str]) -> Array:
    """C[q, n, j] as one inner product after the other, of preconditioned queries with training features."""
    num_queries, num_rows = len(queries[groups[0]]), len(rows[groups[0]])
    c = np.zeros((num_queries, num_rows, len(groups)))
    for q in range(num_queries):
        for n in range(num_rows):
            for j, group in enumerate(groups):
                c[q, n, j] = queries[group][q].astype(np.float64) @ rows[group][n].astype(np.float64)
    return c


def scores(c: Array, weights: Array) -> Array:
    """S[q, n] = sum over groups of w_j C[q, n, j]."""
    total = np.zeros(c.shape[:2])
    for j, weight in enumerate(weights):
        total += weight * c[:, :, j].astype(np.float64)
    return total


def top(scores_n: Array, k: int) -> list[int]:
    """Rows of the k highest scores, best first, the earlier row first among equals."""
    return sorted(range(len(scores_n)), key=lambda row: (-scores_n[row], row))[:k]


def loss(c_nm: Tensor, raw: Tensor, k: int) -> Tensor:
    """Algorithm 1's loss of one query, differentiable in w_raw."""
    score: Tensor = c_nm @ torch.softmax(raw, 0)
    chosen = top(score.detach().numpy(), k)
    return -torch.mean((score / torch.linalg.norm(score))[chosen])


def learn(
    c: Array,
    raw: Array,
    visits: Sequence[tuple[int, int]],
    *,
    k: int,
    learning_rate: float,
    weight_decay: float,
) -> tuple[Array, list[float]]:
    """Algorithm 1 on a dense C [Q, N, M], by autograd and torch's own optimizer and schedule; w and every loss."""
    parameter = nn.Parameter(torch.tensor(raw, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=learning_rate, weight_decay=weight_decay)
    # A schedule that is stepped without the optimizer (a query of zero norm) warns, so the rates are computed first.
    rates = [learning_rate * (1 + math.cos(math.pi * step / len(visits))) / 2 for step in range(len(visits))]
    losses = []
    for (_, query), rate in zip(visits, rates, strict=True):
        c_nm = torch.tensor(c[query], dtype=torch.float64)
        if not (c_nm @ torch.softmax(parameter.detach(), 0)).any():
            losses.append(math.nan)
            continue
        value = loss(c_nm, parameter, k)
        optimizer.zero_grad()
        torch.autograd.backward(value)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(value.item())
    return torch.softmax(parameter.detach(), 0).numpy(), losses


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
