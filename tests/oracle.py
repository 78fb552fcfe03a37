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


def class_probability(scores: Array, number: int) -> float:
    """The softmax of one row of scores, at one class."""
    terms = [math.exp(score - float(scores.max())) for score in scores.astype(np.float64)]
    return terms[number] / sum(terms)


def gradient(model: nn.Module, output: Callable[[nn.Module], Tensor]) -> dict[str, Array]:
    """Gradient of one example's output with respect to every parameter, by autograd in float64, as canonical matrices.

    These are [out, in], [out, in x window] of a convolution, [n, 1] of a vector; leading dimensions of a stack of matrices
    are folded into the first.
    """
    model = copy.deepcopy(model).double()
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    torch.autograd.backward(output(model).sum())
    gradients = {}
    for name, parameter in parameters.items():
        dense = np.zeros(tuple(parameter.shape)) if parameter.grad is None else parameter.grad.numpy()
        holder = model.get_submodule(name.rpartition(".")[0])
        if dense.ndim == 1 or type(holder).__name__ == "LayerNorm":
            dense = dense.reshape(-1, 1)
        elif type(holder).__name__ == "Conv1D":
            dense = dense.T
        elif isinstance(holder, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            dense = dense.reshape(len(dense), -1)
        gradients[name] = dense.reshape(-1, dense.shape[-1])
    return gradients


def project_two_sided(gradient_oi: Array, output_matrix: Array, input_matrix: Array) -> Array:
    """P_o G P_i^T, flattened row by row, one inner product at a time."""
    features = np.zeros((len(output_matrix), len(input_matrix)))
    for a, output_row in enumerate(output_matrix.astype(np.float64)):
        for b, input_row in enumerate(input_matrix.astype(np.float64)):
            features[a, b] = output_row @ gradient_oi @ input_row
    return features.reshape(-1)


def project_dense(vector: Array, tile: Array, row_signs: Array, column_signs: Array) -> Array:
    """P g with P[a, c] = r[a, t] B[a, c - start of t] s[c] / sqrt(k), in the tile t that column c lies in."""
    features, width = tile.shape
    result = np.zeros(features)
    for a in range(features):
        for c, value in enumerate(vector):
            t, within = divmod(c, width)
            result[a] += float(row_signs[a, t]) * float(tile[a, within]) * float(column_signs[c]) * value
    return result / math.sqrt(features)


def project_sparse(vector: Array, words: Sequence[Array], features: int) -> Array:
    """Each coordinate goes to one feature for each draw of 32 bits: the highest is the sign, the others choose."""
    result = np.zeros(features)
    for draw in words:
        for value, bits in zip(vector, draw, strict=True):
            sign = 1 if int(bits) >= 2**31 else -1
            result[(int(bits) % 2**31) * features // 2**31] += sign * value
    return result / math.sqrt(len(words))


def best_rank(matrix: Array, rank: int) -> Array:
    """The matrix of at most that rank which is nearest to a matrix."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((left[:, :rank] * values[:rank]) @ right[:rank])


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


def noise_levels(steps: int, beta_start: float, beta_end: float) -> Array:
    """Cumulated products of 1 - beta, of betas that grow by equal steps: one multiplication after the other."""
    kept, product = np.zeros(steps), 1.0
    for step in range(steps):
        product *= 1 - (beta_start + (beta_end - beta_start) * step / (steps - 1))
        kept[step] = product
    return kept


def diffusion_output(predicted: Array, noise: Array | None, kind: str) -> float:
    """f of one example from its predictions [S, ...]: ddpm_simple with the noise that is in them, square or das."""
    total = 0.0
    for s in range(len(predicted)):
        values = predicted[s].astype(np.float64).ravel()
        added = np.zeros(len(values)) if noise is None else noise[s].astype(np.float64).ravel()
        for value, sought in zip(values, added, strict=True):
            total += {"ddpm_simple": (sought - value) ** 2, "square": value**2, "das": value}[kind]
    return total / len(predicted)


def sample(
    predict: Callable[[Array, int], Array], start: Array, noise_levels: Mapping[int, float], draws: Mapping[int, Array]
) -> tuple[Array, dict[int, Array]]:
    """An image from noise, and the noisy image that each timestep began with.

    The step is that of DDPM's posterior (arXiv 2006.11239, eq. 7) between the given levels where there are ``draws``, and
    that of DDIM (arXiv 2010.02502, eq. 12) where there are none; images are held to [-1, 1].
    """
    x, path = start.astype(np.float64), {}
    timesteps = sorted(noise_levels, reverse=True)
    for place, t in enumerate(timesteps):
        path[t] = x
        now = noise_levels[t]
        later = noise_levels[timesteps[place + 1]] if place + 1 < len(timesteps) else 1.0
        image = np.clip((x - math.sqrt(1 - now) * predict(x, t)) / math.sqrt(now), -1, 1)
        if t in draws:
            kept = now / later
            mean = math.sqrt(later) * (1 - kept) / (1 - now) * image + math.sqrt(kept) * (1 - later) / (1 - now) * x
            x = mean + math.sqrt((1 - later) / (1 - now) * (1 - kept)) * draws[t]
        else:
            direction = (x - math.sqrt(now) * image) / math.sqrt(1 - now)
            x = math.sqrt(later) * image + math.sqrt(1 - later) * direction
    return x, path
