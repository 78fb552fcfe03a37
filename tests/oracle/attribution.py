"""Kernels and contributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

Array = np.ndarray


def precondition(
    train_nd: Array,
    query_qd: Array,
    *,
    kind: str,
    damping: float,
    mode: str,
    factors: Sequence[tuple[Array, Array]] = (),
) -> Array:
    """K psi of every query, with K built from the training features of the same group.

    ``factors`` are, for ekfac, the covariances (of output gradients, of inputs) of every part of the group.
    """
    query_qd = query_qd.astype(np.float64)
    if kind == "identity":
        return query_qd
    if kind == "ekfac":
        return _precondition_in_eigenbases(train_nd, query_qd, factors, damping=damping, mode=mode)
    gram = train_nd.astype(np.float64).T @ train_nd.astype(np.float64)
    if mode == "relative":
        damping = damping * np.trace(gram) / len(gram)
    if damping == 0:
        return np.zeros_like(query_qd)
    if kind == "diagonal":
        gram = np.diag(np.diag(gram))
    return np.linalg.solve(gram + damping * np.eye(len(gram)), query_qd.T).T


def _precondition_in_eigenbases(
    train_nd: Array, query_qd: Array, factors: Sequence[tuple[Array, Array]], *, damping: float, mode: str
) -> Array:
    """EKFAC: each part's features as coordinates of u_a v_b^T, divided by their mean square over the training rows."""
    directions, start = [], 0
    for left, right in factors:
        _, left_vectors = np.linalg.eigh(left.astype(np.float64))
        _, right_vectors = np.linalg.eigh(right.astype(np.float64))
        size = len(left) * len(right)
        for a in range(len(left)):
            for b in range(len(right)):
                direction = np.zeros(train_nd.shape[1])
                direction[start : start + size] = np.outer(left_vectors[:, a], right_vectors[:, b]).reshape(-1)
                directions.append(direction)
        start += size
    basis = np.array(directions)
    means = np.square(train_nd.astype(np.float64) @ basis.T).mean(0)
    if mode == "relative":
        damping = damping * means.mean()
    if damping == 0:
        return np.zeros_like(query_qd)
    return np.asarray((query_qd @ basis.T / (means + damping)) @ basis)


def contributions(queries: Mapping[str, Array], rows: Mapping[str, Array], groups: Sequence[str]) -> Array:
    """C[q, n, j], inner products of preconditioned queries with training features."""
    return np.stack([queries[group].astype(np.float64) @ rows[group].astype(np.float64).T for group in groups], axis=2)


def self_influence(preconditioned: Mapping[str, Array], rows: Mapping[str, Array], groups: Sequence[str]) -> Array:
    """tau_j(n, n) [N, M] as one inner product after the other, of K phi_n with phi_n in group j."""
    tau = np.zeros((len(rows[groups[0]]), len(groups)))
    for n in range(len(tau)):
        for j, group in enumerate(groups):
            tau[n, j] = preconditioned[group][n].astype(np.float64) @ rows[group][n].astype(np.float64)
    return tau


def normalized(c: Array, row_selves: Array, query_selves: Array, kind: str) -> Array:
    """C[q, n, j] by the norms of example n and, for the cosine, of query q; 0 where either has none."""
    result = np.zeros(c.shape)
    for q in range(c.shape[0]):
        for n in range(c.shape[1]):
            norm = math.sqrt(row_selves[n])
            norm *= math.sqrt(query_selves[q]) if kind == "cosine" else 1.0
            if norm != 0:
                result[q, n] = c[q, n].astype(np.float64) / norm
    return result


def das(c: Array, residuals: Array, leverages: Array) -> Array:
    """What DAS makes of C[q, n, j], still linear: times r_n / (1 - h_n)."""
    result = np.zeros(c.shape)
    for n, (residual, leverage) in enumerate(zip(residuals, leverages, strict=True)):
        result[:, n] = c[:, n].astype(np.float64) * float(residual) / (1 - float(leverage))
    return result


def full_kernel_products(
    train: Mapping[str, Array], rows: Mapping[str, Array], groups: Sequence[str], *, damping: float, mode: str
) -> Array:
    """K phi of every row, [D, N], by solving (Phi^T Phi + lambda I) x = phi over all groups' features side by side."""
    phi = np.concatenate([train[group].astype(np.float64) for group in groups], axis=1)
    gram = phi.T @ phi
    if mode == "relative":
        damping = damping * np.trace(gram) / len(gram)
    against = np.concatenate([rows[group].astype(np.float64) for group in groups], axis=1)
    if damping == 0:
        return np.zeros_like(against.T)
    return np.asarray(np.linalg.solve(gram + damping * np.eye(len(gram)), against.T))


def full_contributions(
    train: Mapping[str, Array],
    queries: Mapping[str, Array],
    groups: Sequence[str],
    *,
    damping: float,
    mode: str = "relative",
    rows: Mapping[str, Array] | None = None,
) -> Array:
    """C[q, n, j] of the kernel across groups, which is built from ``train``, for ``rows`` or the same: psi_j [K phi^T]_j."""
    against = train if rows is None else rows
    products = full_kernel_products(train, against, groups, damping=damping, mode=mode)
    c = np.zeros((len(queries[groups[0]]), products.shape[1], len(groups)))
    start = 0
    for j, group in enumerate(groups):
        stop = start + queries[group].shape[1]
        c[:, :, j] = queries[group].astype(np.float64) @ products[start:stop]
        start = stop
    return c


def full_self_influence(
    train: Mapping[str, Array],
    rows: Mapping[str, Array],
    groups: Sequence[str],
    *,
    damping: float,
    mode: str = "relative",
) -> Array:
    """tau_j(n, n) [N, M] of rows under the kernel across groups: what each would add to its own attribution."""
    c = full_contributions(train, rows, groups, damping=damping, mode=mode, rows=rows)
    return np.stack([c[n, n] for n in range(len(c))])
