"""LDS, and ranking accuracy, with the intervals that `gradstore evaluate lds` told, where what models output that were trained on subsets is at hand."""

# Q queries, S subsets, R rows of the eval set.

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradstore.errors import DataError, GradstoreError, NotReadyError
from gradstore.stages.evaluate import compared_predictions
from gradstore.stages.retraining import averaged, folder_of
from gradstore.stages.score.sources import Method
from gradstore.store.artifacts import RetrainedArtifact
from gradstore.store.backend import Storage
from gradstore.store.blocks import in_parallel
from gradstore.store.features import FeatureStore

# Fewer digits than would be a burden in the name of a stranger's evaluation.
_EVALUATION: Final = r"lds\.(.+)\.(\d{1,6})x(\d{1,3})(?:\.attention[^/]*)?"
_MEASURE: Final = "correlation"


def compared_two_way(
    store: FeatureStore, evaluation: str, found: Sequence[tuple[Method, pa.Table]], *, seed: int
) -> list[dict[str, Any]] | None:
    """Return LDS and ranking accuracy of each method as `compared_predictions` does, by a bootstrap of queries and of subsets.

    None where what the models output is neither in the store nor in the one that its run names, or gives other correlations;
    and where methods were measured of different queries.
    """
    from gradstore.numerics.metrics import linear_datamodeling_score

    named, queries = re.fullmatch(_EVALUATION, evaluation), found[0][1]["query"]
    if named is None or any(table["query"] != queries for _, table in found):
        return None
    subsets, rows_Q = int(named[2]), queries.to_numpy()
    sums = {method: pc.list_flatten(table["predicted"]).to_numpy() for method, table in found}
    outputs_SR = _outputs(store, named[1], subsets, int(named[3]))
    if outputs_SR is None or any(of_method.size != len(rows_Q) * subsets for of_method in sums.values()):
        return None
    if not (rows_Q.min() >= 0 and rows_Q.max() < outputs_SR.shape[1] and np.isfinite(outputs_SR[:, rows_Q]).all()):
        return None
    actual_SQ = outputs_SR[:, rows_Q]
    predicted = {method: of_method.reshape(-1, subsets) for method, of_method in sums.items()}
    for method, table in found:
        again_Q = linear_datamodeling_score(predicted[method], actual_SQ).correlations
        if not np.allclose(again_Q, table[_MEASURE].to_numpy(), equal_nan=True):
            return None
    return compared_predictions(predicted, actual_SQ, seed=seed)


def _outputs(store: FeatureStore, name: str, subsets: int, seeds: int) -> np.ndarray | None:
    """[S, R]: what models of a name output, larger is better, the mean of the seeds of every subset; None if one is missing."""
    places = [folder_of(place) for place in product(range(subsets), range(seeds))]
    for storage in _keepers(store):
        try:
            # The last one first: where it is missing there is no need to look for the others.
            RetrainedArtifact.open(storage, name, places[-1])
            of_name = partial(RetrainedArtifact.open, storage, name)
            return averaged(in_parallel(of_name, places, threads=storage.concurrency), seeds)["eval"]
        except (NotReadyError, DataError):
            continue
    return None


def _keepers(store: FeatureStore) -> Sequence[Storage]:
    """Where models may be: the store, and the one that its run names."""
    section = (store.run.get("evaluate") or {}).get("lds") or {}
    url, here = section.get("store"), store.storage.url
    # A store may be a stranger's: what it names on another server is not asked for.
    if url is None or urlsplit(url)[:2] != urlsplit(here)[:2]:
        return [store.storage]
    try:
        return [store.storage, FeatureStore.open(url).storage]
    except GradstoreError:
        return [store.storage]
