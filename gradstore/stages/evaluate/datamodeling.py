"""Evaluate lds: how well scores predict what models output that were trained on subsets of the train set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from gradstore.cluster import Engine
from gradstore.errors import DataError, SpecError
from gradstore.spec import RunSpec
from gradstore.stages.contributions import valid_rows_of
from gradstore.stages.evaluate.methods import Compared, candidates, contenders, described
from gradstore.stages.evaluate.told import told_comparison
from gradstore.stages.progress import Progress
from gradstore.stages.retraining import KEY, Retrained, lds_outputs, section_of
from gradstore.stages.score.sources import Method
from gradstore.stages.weights import UNWEIGHTED
from gradstore.store.artifacts import EvaluationArtifact
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    from gradstore.numerics.metrics import SubsetSums
    from gradstore.numerics.representation import AttentionPools
    from gradstore.spec.evaluation import DatamodelingSection

MEASURE: Final = "lds"
ACCURACY: Final = "ranking_accuracy"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Judge:
    """What methods are judged by: what retrained models output for the queries of a set that count."""

    spec: RunSpec
    retrained: Retrained
    set_name: str
    queries: np.ndarray

    @property
    def actual(self) -> np.ndarray:
        """[S, Q]: outputs for these queries."""
        return self.retrained.outputs[self.set_name][:, self.queries]

    @property
    def measure(self) -> str:
        """Folder of what is measured."""
        told = f"{MEASURE}.{section_of(self.spec).title}"
        return told if self.set_name == "eval" else f"{told}.{self.set_name}"

    @classmethod
    def of(cls, spec: RunSpec, store: FeatureStore, retrained: Retrained, set_name: str) -> _Judge:
        """Take the valid queries of a set for which models differ.

        Raises
        ------
        DataError
            If there are none.
        """
        valid = valid_rows_of(store, set_name)
        kept = valid[np.ptp(retrained.outputs[set_name][:, valid], axis=0) > 0]
        if not len(kept):
            raise DataError(
                f"{KEY}: every model outputs the same for every query of {set_name}; their training changes nothing."
            )
        return cls(spec=spec, retrained=retrained, set_name=set_name, queries=kept)


def evaluate_lds(spec: RunSpec, engine: Engine, progress: Progress) -> dict[str, Any]:
    """Measure the linear datamodeling score of every method, as [evaluate.lds] says; return what it amounts to.

    Models that were trained are kept at ``retrained/<name>``, and at ``evaluations/lds.<name>.<subsets>x<seeds>/<method>`` the
    correlation of every query and what its scores predicted of every subset, by which means and intervals can be computed again;
    at ``<kernel>.groups`` the same of every group alone.

    Raises
    ------
    SpecError
        If there is no [evaluate.lds], or no such trainer; or groups or a choice are asked for where there are scores alone.
    NotReadyError
        If contributions or weights are missing.
    DataError
        If models that were trained output the same for every query.
    ContractError
        If models of this name were trained otherwise.
    """
    store, section = FeatureStore.open(spec.run.store), section_of(spec)
    if spec.contribute.mode == "scores" and (section.groups or section.choose is not None):
        key = "groups" if section.groups else "choose"
        raise SpecError(
            f'{KEY}.{key}: found {getattr(section, key)!r} with contribute.mode = "scores", which makes neither the parts of scores nor '
            'those of learn queries; set contribute.mode = "tensor" or "streamed", or leave groups = false and choose out.'
        )
    # Before hours of training.
    found = [*contenders(spec, store, engine, progress)]
    offered = [] if section.choose is None else [*candidates(spec, store, engine, progress, section.choose)]
    retrained = lds_outputs(spec, engine, progress)
    judge = _Judge.of(spec, store, retrained, "eval")
    choice = None if section.choose is None else _choose(offered, spec, store, retrained)
    if choice is not None:
        found = [_joined(of_kernel, choice) for of_kernel in found]
    predicted = [_predicted(of_kernel, judge) for of_kernel in found]
    return {
        "store": spec.run.store,
        "measure": MEASURE,
        "retrained": section.name,
        "subsets": section.subsets,
        "seeds": section.seeds,
        "share": section.share,
        "queries": len(judge.queries),
        "queries_without": store.open_set("eval").info.num_examples - len(judge.queries),
        "methods": [
            row for methods, _ in predicted for row in compared_predictions(methods, judge.actual, seed=spec.run.seed)
        ],
        "groups": [row for _, groups in predicted for row in groups],
        "chosen": None if choice is None else choice.told(predicted, judge),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What does best on the queries of another set: without weights, and with some."""

    set_name: str
    unweighted: Method
    weighted: Method | None
    means: Mapping[Method, float]

    def told(self, predicted: Sequence[tuple[Mapping[Method, np.ndarray], Any]], judge: _Judge) -> dict[str, Any]:
        """What was chosen, with its LDS of the reported queries and the paired difference of weights to none."""
        from gradstore.numerics.metrics import compare_datamodeling

        every = {method: of_method for methods, _ in predicted for method, of_method in methods.items()}
        chosen = [method for method in (self.unweighted, self.weighted) if method is not None]
        compared = compare_datamodeling(
            {method.artifact: every[method] for method in chosen},
            judge.actual,
            against=self.unweighted.artifact,
            seed=judge.spec.run.seed,
        )
        return {
            "by": self.set_name,
            "candidates": [{**described(method), MEASURE: mean} for method, mean in self.means.items()],
            "methods": [
                {
                    **described(method),
                    f"{MEASURE} of {self.set_name}": self.means[method],
                    **told_comparison(compared[method.artifact]),
                }
                for method in chosen
            ],
        }


def _choose(offered: Sequence[Compared], spec: RunSpec, store: FeatureStore, retrained: Retrained) -> _Choice:
    """Take the kernel, and the kernel and weights, of the highest mean LDS of the queries of another set; of equal ones the first."""
    from gradstore.numerics.metrics import linear_datamodeling_score

    set_name = str(section_of(spec).choose)
    judge = _Judge.of(spec, store, retrained, set_name)
    means = {}
    for of_kernel in offered:
        for method, predicted_QS in _predicted(of_kernel, judge)[0].items():
            means[method] = float(
                np.nan_to_num(linear_datamodeling_score(predicted_QS, judge.actual).correlations).mean()
            )
    without = [method for method in means if method.weights is None]
    weighted = [method for method in means if method.weights is not None]
    return _Choice(
        set_name=set_name,
        unweighted=max(without, key=means.__getitem__),
        weighted=max(weighted, key=means.__getitem__, default=None),
        means=means,
    )


def _joined(found: Compared, choice: _Choice) -> Compared:
    """The methods of a kernel with the one that was chosen, if it is of this kernel and none of them."""
    chosen = choice.weighted
    if chosen is None or chosen in found.methods or chosen.kernel != found.spec.kernel.name:
        return found
    return replace(found, methods=(*found.methods, chosen))


def _predicted(found: Compared, judge: _Judge) -> tuple[dict[Method, np.ndarray], list[dict[str, Any]]]:
    """What the scores of each method predict of the queries, [Q, S], and the LDS of every group; measured where it is not there."""
    section, storage = section_of(found.spec), found.store.storage
    # What nothing else could be once was not said then.
    pooled = section.model_dump(include={"pool", "sharpness"}, exclude_defaults=True)
    evaluated = {**section.model_dump(exclude={"groups", "choose", "store", "pool", "sharpness"}), **pooled}
    artifacts = {
        method: EvaluationArtifact.create(
            storage,
            judge.measure,
            method.artifact,
            settings={"measure": MEASURE, "evaluated": evaluated, **found.settings(method)},
        )
        for method in found.methods
    }
    missing = [method for method, artifact in artifacts.items() if not artifact.is_complete()]
    by_group = _of_groups(found, judge, evaluated) if section.groups and judge.set_name == "eval" else None
    of_groups = by_group is not None and not by_group.is_complete()
    if missing or of_groups:
        masks_SN, rows = judge.retrained.masks, found.store.open_set(judge.set_name).info.rows
        groups = [array.name for array in found.store.open_set("train").info.arrays]
        sums = {method: _pools(section, method, masks_SN, rows) for method in missing}
        # Every group of a query is like a query of its own.
        group_sums = _pools(section, found.methods[0], masks_SN, rows * len(groups)) if of_groups else None
        # Parts come with the scores of a kernel.
        scanned = [*missing, *([found.methods[0]] if of_groups and found.methods[0] not in missing else [])]
        for piece in found.scan(scanned, MEASURE):
            for method, scores in piece.scores.items():
                if method in sums:
                    sums[method].add(scores, piece.rows, piece.first)
            if group_sums is not None and piece.parts is not None:
                of_each = piece.parts.transpose(0, 2, 1).reshape(-1, len(piece.rows))
                group_sums.add(of_each, piece.rows, piece.first * len(groups))
        for method, of_method in sums.items():
            artifacts[method].write(
                _table(of_method.total()[judge.queries], judge), facts={"queries": len(judge.queries)}
            )
        if group_sums is not None and by_group is not None:
            totals = group_sums.total().reshape(rows, len(groups), -1)[judge.queries]
            table = pa.concat_tables(
                _table(totals[:, place], judge).append_column("group", pa.array([name] * len(judge.queries)))
                for place, name in enumerate(groups)
            )
            by_group.write(table, facts={"queries": len(judge.queries)})
    predicted = {method: _read(artifact.read()) for method, artifact in artifacts.items()}
    return predicted, [] if by_group is None else _groups_told(found, by_group.read(), judge)


def _pools(
    section: DatamodelingSection, method: Method, masks_SN: np.ndarray, queries: int
) -> SubsetSums | AttentionPools:
    """What adds up the scores of every subset as they stream by."""
    from gradstore.numerics.metrics import SubsetSums
    from gradstore.numerics.representation import AttentionPools

    if section.pool == "attention" and method.kernel:
        return AttentionPools(masks_SN, queries, sharpness=section.sharpness)
    return SubsetSums(masks_SN, queries)


def _of_groups(found: Compared, judge: _Judge, evaluated: Mapping[str, Any]) -> EvaluationArtifact:
    without = next(method for method in found.methods if method.name == UNWEIGHTED)
    settings = {"measure": MEASURE, "groups": True, "evaluated": evaluated, **found.settings(without)}
    name = f"{found.spec.kernel.name}.groups"
    return EvaluationArtifact.create(found.store.storage, judge.measure, name, settings=settings)


def _table(predicted_QS: np.ndarray, judge: _Judge) -> pa.Table:
    from gradstore.numerics.metrics import linear_datamodeling_score

    score = linear_datamodeling_score(predicted_QS, judge.actual)
    return pa.table(
        {
            "query": pa.array(judge.queries, pa.int64()),
            "correlation": pa.array(score.correlations, pa.float64()),
            "predicted": pa.array([*predicted_QS], pa.list_(pa.float64())),
        }
    )


def _read(table: pa.Table) -> np.ndarray:
    return np.array(table["predicted"].to_pylist())


def _groups_told(found: Compared, table: pa.Table, judge: _Judge) -> list[dict[str, Any]]:
    """LDS of every group alone, in the order of the model."""
    from gradstore.numerics.metrics import compare_datamodeling

    # Rows of a group follow one another, a query each.
    names = [*dict.fromkeys(table["group"].to_pylist())]
    predicted = _read(table)
    by_name = dict(zip(names, predicted.reshape(len(names), -1, predicted.shape[1]), strict=True))
    compared = compare_datamodeling(by_name, judge.actual, seed=found.spec.run.seed)
    return [
        {"kernel": found.spec.kernel.name, "group": name, **told_comparison(comparison)}
        for name, comparison in compared.items()
    ]


def compared_predictions(
    predicted: Mapping[Method, np.ndarray], actual_SQ: np.ndarray, *, seed: int
) -> list[dict[str, Any]]:
    """Return LDS, and the ranking accuracy of the same subsets; differences of weights are to no weights, where these are there.

    Parameters
    ----------
    predicted
        [Q, S] of each method: what its scores predict of every subset.
    actual_SQ
        What the models output that were trained on them, larger is better.
    seed
        Of the bootstrap, of the queries and of the subsets.
    """
    from gradstore.numerics.metrics import compare_datamodeling, compare_ranking

    named = {method.artifact: of_method for method, of_method in predicted.items()}
    without = next((method.artifact for method in predicted if method.name == UNWEIGHTED), None)
    compared = {
        MEASURE: compare_datamodeling(named, actual_SQ, against=without, seed=seed),
        ACCURACY: compare_ranking(named, actual_SQ, against=without, seed=seed),
    }
    told = []
    for method in predicted:
        measures = {}
        for measure, of_methods in compared.items():
            comparison = of_methods[method.artifact]
            shown = comparison if method.weights is not None else comparison._replace(difference=None)
            measures[measure] = told_comparison(shown)
        told.append({**described(method), "queries": actual_SQ.shape[1], "measures": measures})
    return told
