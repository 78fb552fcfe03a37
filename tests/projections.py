"""What every projection makes of a dense gradient, from its draws, part by part, in float64."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from gradstore.groups import ParameterGroup, Part
from gradstore.numerics.generator import derive_key, normal, rademacher, words
from gradstore.numerics.projection import PROJECTIONS, Dense, FactSjlt, Identity, Logra, Lorif, Projection, Sjlt
from gradstore.numerics.projection.dense import TILE, TILE_COLUMNS
from gradstore.spec import resolve_kind
from tests import oracle

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "identity": [{}],
    "logra": [{"rank": 3}, {"rank": 5, "matrices": "normal"}, {"rank": 16}],
    "dense": [{"features": 7}, {"features": 5, "entries": "normal"}],
    "sjlt": [{"features": 11}, {"features": 9, "nonzeros": 3}],
    "fact-sjlt": [{"features": 10, "mask": 5}, {"features": 10, "mask": 40, "nonzeros": 2}],
    "lorif": [{"rank": 4}, {"rank": 6, "factors": 2, "matrices": "normal"}],
}


def projections() -> list[Projection]:
    """Every kind of projection, under several options."""
    return [
        resolve_kind(PROJECTIONS, kind, options, "features.projection")
        for kind in PROJECTIONS
        for options in OPTIONS[kind]
    ]


def expected(group: ParameterGroup, gradients: dict[str, np.ndarray], projection: Projection, seed: int) -> np.ndarray:
    """Features of one example; of rank-c factors the matrices that they stand for."""
    found = [_of_part(part, _gradient(part, gradients), projection, seed) for part in group.parts]
    if isinstance(projection, Dense | Sjlt | FactSjlt):
        return np.asarray(np.sum(found, axis=0))
    return np.concatenate(found)


def expanded(features: np.ndarray, group: ParameterGroup, projection: Projection) -> np.ndarray:
    """Features as `expected` gives them: of rank-c factors u, v the sum of the u_a v_a^T, part by part."""
    if not isinstance(projection, Lorif):
        return features
    found, start = [], 0
    for part in group.parts:
        (rows, columns), factors = projection.shape(part), projection.factors_of(part)
        stop = start + factors * (rows + columns)
        u = features[:, start : start + factors * rows].reshape(-1, factors, rows)
        v = features[:, start + factors * rows : stop].reshape(-1, factors, columns)
        found.append(np.einsum("nar,nas->nrs", u, v).reshape(len(features), -1))
        start = stop
    return np.concatenate(found, 1)


def _gradient(part: Part, gradients: dict[str, np.ndarray]) -> np.ndarray:
    return gradients[part.parameter][slice(*part.rows), slice(*part.columns)]


def _of_part(part: Part, gradient: np.ndarray, projection: Projection, seed: int) -> np.ndarray:
    if isinstance(projection, Identity):
        return gradient.reshape(-1)
    if isinstance(projection, Logra):
        matrices = (matrix.numpy() for matrix in projection.part_matrices(part, seed=seed))
        return oracle.project_two_sided(gradient, *matrices)
    if isinstance(projection, Lorif):
        logra = Logra(rank=projection.rank, matrices=projection.matrices)
        matrix = _of_part(part, gradient, logra, seed).reshape(projection.shape(part))
        return oracle.best_rank(matrix, projection.factors).reshape(-1)
    if isinstance(projection, Dense):
        draw = rademacher if projection.entries == "rademacher" else normal
        tile = draw(derive_key(seed, TILE, projection.entries), projection.features, TILE_COLUMNS)
        tiles = math.ceil(part.size / TILE_COLUMNS)
        rows = rademacher(derive_key(seed, part.key, "rows"), projection.features, tiles)
        columns = rademacher(derive_key(seed, part.key, "columns"), 1, part.size)[0]
        return oracle.project_dense(gradient.reshape(-1), tile.astype(np.float32), rows, columns)
    if isinstance(projection, FactSjlt):
        rows, columns = (kept.numpy() for kept in projection.kept(part, seed=seed))
        scale = math.sqrt(part.size / (len(rows) * len(columns)))
        gradient = scale * gradient[rows][:, columns]
    assert isinstance(projection, Sjlt | FactSjlt), f"give {type(projection).__name__} its dense form here"
    return oracle.project_sparse(
        gradient.reshape(-1), _sparse_draws(part, gradient.size, projection.nonzeros, seed), projection.features
    )


@lru_cache(maxsize=64)
def _sparse_draws(part: Part, size: int, nonzeros: int, seed: int) -> list[np.ndarray]:
    draws = []
    for nonzero in range(nonzeros):
        pairs = words(derive_key(seed, part.key, f"bucket {nonzero}"), math.ceil(size / 2)).astype(np.uint64)
        draws.append(np.stack([pairs % 2**32, pairs >> 32], axis=1).reshape(-1)[:size])
    return draws
