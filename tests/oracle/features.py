"""Outputs, gradients and their projections, of models, of diffusion and of planted stores."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

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
    """P_o G P_i^T, flattened row by row."""
    return np.asarray(output_matrix.astype(np.float64) @ gradient_oi @ input_matrix.astype(np.float64).T).reshape(-1)


def project_dense(vector: Array, tile: Array, row_signs: Array, column_signs: Array) -> Array:
    """P g with P[a, c] = r[a, t] B[a, c - start of t] s[c] / sqrt(k), in the tile t that column c lies in."""
    features, width = tile.shape
    t, within = np.divmod(np.arange(len(vector)), width)
    matrix = row_signs[:, t].astype(np.float64) * tile[:, within] * column_signs
    return np.asarray(matrix @ vector / math.sqrt(features))


def project_sparse(vector: Array, words: Sequence[Array], features: int) -> Array:
    """Each coordinate goes to one feature for each draw of 32 bits: the highest is the sign, the others choose."""
    result = np.zeros(features)
    for draw in words:
        assert len(draw) == len(vector)
        bits = draw.astype(np.int64)
        np.add.at(result, (bits % 2**31) * features // 2**31, np.where(bits >= 2**31, 1, -1) * vector)
    return result / math.sqrt(len(words))


def best_rank(matrix: Array, rank: int) -> Array:
    """The matrix of at most that rank which is nearest to a matrix."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((left[:, :rank] * values[:rank]) @ right[:rank])


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


def planted_draw(seed: int, name: str, side: str, row: int, count: int) -> Array:
    """One row of a table of draws: sums of four digits of 4 bits, less 30, by 8; a row begins at a counter of its own."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=16, person=b"gradstore")
    for part in (name, f"planted {side}"):
        digest.update(len(part).to_bytes(8, "little") + part.encode())
    counters = math.ceil(count / 16)
    stream = np.random.Philox(key=int.from_bytes(digest.digest(), "little"))
    every = stream.random_raw(4 * counters * (row + 1))[4 * counters * row :]
    found = []
    for i in range(count):
        bits = (int(every[i // 4]) >> (16 * (i % 4))) & 0xFFFF
        found.append((sum((bits >> shift) & 0xF for shift in (0, 4, 8, 12)) - 30) / 8)
    return np.array(found)


def planted_colouring(size: int) -> Array:
    """diag(1, 1/2, 1, ...) (I + N/2): row k is of coordinates k and, by half, the one after it."""
    matrix = np.zeros((size, size))
    for k in range(size):
        scale = 0.5 if k % 2 else 1.0
        matrix[k, k] += scale
        matrix[k, (k + 1) % size] += 0.5 * scale
    return matrix


def planted_feature(
    shape: tuple[int, int], noise: Array, signals: Sequence[tuple[float, Array]], scale: float
) -> Array:
    """s L (E + sum of strength times direction) R^T, flattened row by row."""
    z = noise.reshape(shape).copy()
    for strength, direction in signals:
        z += strength * direction.reshape(shape)
    left, right = planted_colouring(shape[0]), planted_colouring(shape[1])
    return np.asarray((scale * left @ z @ right.T).reshape(-1))
