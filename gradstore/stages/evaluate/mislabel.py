"""Evaluate mislabel: whether self-influence finds the train examples whose label is wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from gradstore.adapters.encoder import OUTPUT as REPRESENTATION
from gradstore.adapters.images.splits import CLASS, TRUE_CLASS
from gradstore.cluster import Engine
from gradstore.errors import DataError, SpecError
from gradstore.lines import read_ids
from gradstore.numerics.generator import derive_key, permutation, words
from gradstore.spec import RunSpec, content_hash
from gradstore.spec.evaluation import MislabelSection
from gradstore.stages.contributions import valid_rows_of
from gradstore.stages.evaluate.told import AUC, NORMALIZED_AUC, compared_detection
from gradstore.stages.evaluate.top_scores import top_means
from gradstore.stages.featurize.tables import DAS, MARGIN
from gradstore.stages.influence.totals import Asked, find_influence
from gradstore.stages.progress import Progress
from gradstore.stages.score.sources import RANDOM, Method, weighted_methods
from gradstore.stages.self_influence import self_influence
from gradstore.stages.weights import open_weights
from gradstore.store.artifacts import EvaluationArtifact, SelfInfluenceArtifact
from gradstore.store.examples import INPUT
from gradstore.store.features import FeatureStore

MEASURE: Final = "mislabel"
KEY: Final = "evaluate.mislabel"
# The loss of an example: what is ranked by where nothing else is at hand.
LOSS: Final = Method(name="loss")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Looked:
    """The rows that are looked through [n], ascending, which of them have a wrong label, and where that is known from."""

    rows: np.ndarray
    wrong: np.ndarray
    known: Mapping[str, Any]


def evaluate_mislabel(spec: RunSpec, engine: Engine, progress: Progress) -> dict[str, Any]:
    r"""Measure the AUC of self-influence for wrong labels, as [evaluate.mislabel] says; return what it amounts to.

    .. math:: \tau(n, n), \qquad \tau(n, n) \Big/ \tfrac{1}{k} \sum_{m \in \mathrm{top}_k} S[n, m]

    The second is self-influence beside the mean of the example's own k highest scores, as a query among all train examples
    (arXiv 2506.05647, B.2.2). Values of every row are kept at ``evaluations/mislabel/<method>``.

    Raises
    ------
    SpecError
        If there is no [evaluate.mislabel], or nothing says which labels are wrong.
    DataError
        If all labels that are looked at are wrong, or none is.
    NotReadyError
        If spectra or weights are missing.
    ContractError
        If it was measured otherwise.
    """
    section = spec.evaluate.mislabel
    if section is None:
        raise SpecError(f"{KEY}: is missing; accepted: a table [{KEY}].")
    store = FeatureStore.open(spec.run.store)
    if store.contract["model"].get("output") == DAS:
        raise SpecError(f"{KEY}: the store's output function is {DAS}, by which no example has an influence on itself.")
    if store.contract["model"].get("output") == REPRESENTATION:
        raise SpecError(
            f"{KEY}: the store holds representations, whose products with themselves are lengths and tell of no label."
        )
    if spec.contribute.normalize != "none":
        raise SpecError(
            f'{KEY}: found contribute.normalize = "{spec.contribute.normalize}", by which every example is as much its own; set it to '
            '"none".'
        )
    looked = _look(spec, store, section)
    self_influence(spec, engine, progress)
    found: list[tuple[Method, pa.Table]] = []
    for place, swept in enumerate(spec.sweep()):
        found += _of_kernel(swept, store, looked, progress)
        found += _baselines(spec, store, looked) if place == 0 else []
    return {
        "store": spec.run.store,
        "measure": MEASURE,
        "queries": len(looked.rows),
        "wrong": int(looked.wrong.sum()),
        "methods": compared_detection(found, looked.wrong, seed=spec.run.seed),
    }


def _look(spec: RunSpec, store: FeatureStore, section: MislabelSection) -> _Looked:
    train = store.open_set("train")
    wrong_N, known = np.zeros(train.info.rows, bool), {}
    if section.examples is not None:
        ids = read_ids(Path(section.examples), f"{KEY}.examples")
        names = train.read_column("example_id")
        if strange := sorted(ids - {*names}):
            raise DataError(f"{KEY}.examples: {section.examples}: {strange[0]!r} is not the id of a train example.")
        wrong_N[:] = [name in ids for name in names]
        known = {"examples": content_hash(sorted(ids))}
    else:
        for block in range(train.info.num_blocks):
            table = train.read_inputs(block)
            if INPUT + TRUE_CLASS not in table.column_names:
                raise SpecError(
                    f"{KEY}: nothing says which labels are wrong; accepted: examples, a file of the ids of those whose label is, or "
                    "a run with model.options.mislabelled, which makes some wrong."
                )
            wrong = np.array(table[INPUT + CLASS].to_pylist()) != np.array(table[INPUT + TRUE_CLASS].to_pylist())
            wrong_N[slice(*train.info.block_range(block))] = wrong
        known = {"examples": "model.options.mislabelled"}
    valid = valid_rows_of(store, "train")
    drawn = permutation(words(derive_key(spec.run.seed, "evaluate", MEASURE), len(valid)))
    rows = valid[drawn < section.rows]
    if not 0 < (count := int(wrong_N[rows].sum())) < len(rows):
        raise DataError(
            f"{KEY}: {count:,} of {len(rows):,} labels that are looked at are wrong; it needs some of both."
        )
    return _Looked(rows=rows, wrong=wrong_N[rows], known=known)


def _of_kernel(
    spec: RunSpec, store: FeatureStore, looked: _Looked, progress: Progress
) -> Iterator[tuple[Method, pa.Table]]:
    """Values by one kernel of a sweep, with and without weights; measured where the store does not have them."""
    section = spec.evaluate.mislabel
    assert section is not None, "it was refused"
    artifacts = {}
    for method in weighted_methods(spec):
        made_from: dict[str, Any] = {
            member: dict(SelfInfluenceArtifact.open(store.storage, spec.kernel.name, member).settings)
            for member in store.open_set("train").info.members
        }
        if method.weights is not None:
            made_from["weights"] = dict(open_weights(store, method.weights).settings)
        settings = {
            "measure": MEASURE,
            "rows": section.rows,
            "top": section.top,
            "seed": spec.run.seed,
            "known": looked.known,
            "self_influence": made_from,
        }
        artifacts[method] = EvaluationArtifact.create(store.storage, MEASURE, method.artifact, settings=settings)
    missing = [method for method, artifact in artifacts.items() if not artifact.is_complete()]
    if missing:
        tops = top_means(spec, missing, looked.rows, section.top, progress) if section.top else {}
        for method in missing:
            own = _self_influence(spec, store, method, looked.rows)
            values = {AUC: own} | ({NORMALIZED_AUC: own / tops[method]} if section.top else {})
            artifacts[method].write(_table(looked, values), facts={"rows": len(looked.rows)})
    return ((method, artifact.read()) for method, artifact in artifacts.items())


def _self_influence(spec: RunSpec, store: FeatureStore, method: Method, rows: np.ndarray) -> np.ndarray:
    """Influence of some rows on themselves, as C would have it."""
    found = find_influence(spec.run.store, Asked(kernel=spec.kernel.name, weights=method.weights, on_itself=True))
    own = found.totals[np.searchsorted(found.rows, rows)]
    if method.weights is None:
        own = own / len(store.open_set("train").info.arrays)
    if store.contract["model"].get("output") != MARGIN:
        return own
    # Of a margin a train row counts 1 - p times.
    p = store.open_set("train").read_column("p")
    return np.asarray(own * (1 - np.array([p[row] for row in rows])))


def _baselines(spec: RunSpec, store: FeatureStore, looked: _Looked) -> Iterator[tuple[Method, pa.Table]]:
    """By the loss of each example, and by chance."""
    output = store.open_set("train").read_column("loss")
    sign = -1.0 if store.contract["model"].get("output") == MARGIN else 1.0
    random = words(derive_key(spec.run.seed, "evaluate", "random rows"), len(looked.rows)) / 2.0**64
    for method, values in (
        (LOSS, sign * np.array([output[row] for row in looked.rows])),
        (RANDOM, random),
    ):
        settings = {
            "measure": MEASURE,
            "rows": len(looked.rows),
            "seed": spec.run.seed,
            "known": looked.known,
            "train": store.describe("train"),
        }
        artifact = EvaluationArtifact.create(store.storage, MEASURE, method.artifact, settings=settings)
        if not artifact.is_complete():
            artifact.write(_table(looked, {AUC: values}), facts={"rows": len(looked.rows)})
        yield method, artifact.read()


def _table(looked: _Looked, values: Mapping[str, np.ndarray]) -> pa.Table:
    columns = {name: pa.array(of, pa.float64()) for name, of in values.items()}
    return pa.table({"example": pa.array(looked.rows, pa.int64()), "wrong": pa.array(looked.wrong), **columns})
