"""Models that are trained on subsets of the train set: one task and one artifact for each, so that none is trained twice."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from gradstore.adapters.training import outputs_of, resolve_trainer, trainer_settings
from gradstore.cluster import Engine, Task
from gradstore.errors import DataError, SpecError, SupersededError
from gradstore.numerics.generator import derive_key
from gradstore.plan.resolve import make_adapter, resolve_device
from gradstore.spec import RunSpec, content_hash
from gradstore.spec.evaluation import DatamodelingSection
from gradstore.stages.contributions import valid_rows_of
from gradstore.stages.featurize.tables import MARGIN
from gradstore.stages.progress import Progress
from gradstore.stages.reading import examples_at
from gradstore.store.artifacts import RetrainedArtifact
from gradstore.store.codecs import plain
from gradstore.store.contract import require_equal
from gradstore.store.examples import Example
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    from torch import nn

    from gradstore.adapters import Adapter

KEY: Final = "evaluate.lds"
# Damping and the like are chosen by queries of learn, so that none is by those that are reported.
QUERY_SETS: Final = ("learn", "eval")
_SETS: Final = ("train", *QUERY_SETS)
# Output function of diffusion models that is a loss.
_ERROR: Final = "ddpm_simple"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrained:
    """What models output that were trained on subsets.

    Attributes
    ----------
    masks
        [S, rows of the train set]: which are in a subset; rows that are not valid are in none.
    outputs
        By query set, [S, Q]: f of each query, larger is better, averaged over the models of a subset.
    """

    masks: np.ndarray
    outputs: Mapping[str, np.ndarray]


def retrain(spec: RunSpec, engine: Engine, progress: Progress) -> Retrained:
    """Train the models that are missing of those that [evaluate.lds] asks for, and read what all of them output.

    Raises
    ------
    SpecError
        If there is no [evaluate.lds], or no such trainer.
    ContractError
        If models of this name were trained otherwise.
    """
    section = section_of(spec)
    resolve_trainer(spec.training.trainer, spec.training.options)
    store = FeatureStore.open(spec.run.store)
    places = [(subset, seed) for subset in range(section.subsets) for seed in range(section.seeds)]
    keeper = _keeper(spec, store)
    common = _settings(spec, store, keeper)
    artifacts = {
        place: RetrainedArtifact.create(keeper.storage, section.name, _name(place), settings=_of_place(common, place))
        for place in places
    }
    masks_SN = _masks(spec, store, range(section.subsets))
    missing = [place for place in places if not artifacts[place].is_complete()]
    tasks = [
        Task(
            name=f"retrain-{number:06d}",
            function=train_on_subset,
            arguments=(spec.run.store, spec.model_dump(), place),
            resources=spec.cluster.model_resources,
        )
        for number, place in enumerate(missing)
    ]
    if tasks:
        with progress.stage(f"retrain {section.name}", len(tasks), "models") as advance:
            for _ in engine.run(tasks):
                advance(1)
    tables = [artifacts[place].read() for place in places]
    sign = 1.0 if common["output"] == MARGIN else -1.0
    outputs = {name: sign * _averaged([_of_set(table, name) for table in tables], section.seeds) for name in QUERY_SETS}
    return Retrained(masks=masks_SN, outputs=outputs)


def section_of(spec: RunSpec) -> DatamodelingSection:
    """Return [evaluate.lds].

    Raises
    ------
    SpecError
        If there is none.
    """
    if spec.evaluate.lds is None:
        raise SpecError(
            f"{KEY}: is missing; accepted: a table [{KEY}] with subsets and share; [training] says how models are trained."
        )
    return spec.evaluate.lds


def train_on_subset(store_url: str, run: Mapping[str, Any], place: tuple[int, int]) -> None:
    """Task: train one model, (subset, seed), and commit what it outputs for every query.

    Raises
    ------
    SupersededError
        If the models of this name are of other settings: a task of an earlier run may wait on a scheduler still.
    DataError
        If an output is not finite.
    """
    spec, store = RunSpec.model_validate(run), FeatureStore.open(store_url)
    section, (subset, seed) = section_of(spec), place
    keeper = _keeper(spec, store)
    artifact = RetrainedArtifact.open(keeper.storage, section.name, _name(place))
    if artifact.is_complete():
        return
    if artifact.settings != plain(_of_place(_settings(spec, store, keeper), place)):
        raise SupersededError(
            f"{artifact.folder}: is of other settings than this task's. Run `gradstore evaluate` again."
        )
    began = time.monotonic()
    examples = examples_at(store.open_set("train"), np.flatnonzero(_masks(spec, store, [subset])[0]).tolist())
    asked = _asked(spec, store)
    # That of the features needs no mention, which some adapters do not take.
    output = spec.model.output if asked == store.contract["model"]["output"] else asked
    adapter = make_adapter(spec.model_copy(update={"model": spec.model.model_copy(update={"output": output})}))
    trainer = resolve_trainer(spec.training.trainer, spec.training.options)
    drawn = derive_key(spec.run.seed, "lds", f"training {subset} {seed}") % 2**63
    model = trainer(adapter, examples, seed=drawn, device=resolve_device(spec))
    found = {name: _outputs(adapter, model, store, name) for name in QUERY_SETS}
    table = pa.table(
        {
            "set": pa.array([name for name, values in found.items() for _ in values], pa.string()),
            "query": pa.array([query for values in found.values() for query in range(len(values))], pa.int64()),
            "output": pa.array(np.concatenate([*found.values()]), pa.float64()),
        }
    )
    artifact.write(table, facts={"examples": len(examples), "seconds": time.monotonic() - began})


def _outputs(adapter: Adapter, model: nn.Module, store: FeatureStore, name: str) -> np.ndarray:
    """What a model outputs for every query of a set, float64 [Q]; NaN of those that are not valid."""
    queries = valid_rows_of(store, name).tolist()
    examples: list[Example] = examples_at(store.open_set(name), queries)
    found = np.full(store.open_set(name).info.rows, np.nan)
    found[queries] = outputs_of(adapter, model, examples)
    if strange := [query for query in queries if not np.isfinite(found[query])]:
        raise DataError(
            f"{name}: a retrained model outputs no finite number for the queries {strange[:5]}. Train it otherwise."
        )
    return found


def _settings(spec: RunSpec, store: FeatureStore, keeper: FeatureStore) -> dict[str, Any]:
    """What all models of a name have in common."""
    section = section_of(spec)
    return {
        "share": section.share,
        **trainer_settings(spec.training.trainer, spec.training.options),
        "run_seed": spec.run.seed,
        "output": _asked(spec, store),
        **{name: keeper.describe(name) for name in _SETS},
    }


def _keeper(spec: RunSpec, store: FeatureStore) -> FeatureStore:
    """The store that keeps retrained models: the run's own, or another one of the same examples, whose features do not matter.

    Raises
    ------
    ContractError
        If the examples of the other store are others.
    """
    url = section_of(spec).store
    if url is None or url == spec.run.store:
        return store
    keeper = FeatureStore.open(url)
    theirs, ours = ({name: _examples_of(each, name) for name in _SETS} for each in (keeper, store))
    remedy = f"Leave {KEY}.store out: models are then trained for this run."
    require_equal(f"{KEY}.store: {keeper.storage.url}", theirs, ours, remedy=remedy)
    return keeper


def _examples_of(store: FeatureStore, name: str) -> dict[str, Any]:
    """What tells the examples of a set that models are trained on, or asked for."""
    return {"data": store.open_set(name).info.data_hash, "valid": content_hash(valid_rows_of(store, name).tolist())}


def _asked(spec: RunSpec, store: FeatureStore) -> str:
    """The output function of which retrained models are asked."""
    features_of = str(store.contract["model"]["output"])
    return section_of(spec).output or (_ERROR if spec.model.adapter == "diffusion" else features_of)


def _of_place(common: Mapping[str, Any], place: tuple[int, int]) -> dict[str, Any]:
    return {**common, "subset": place[0], "seed": place[1]}


def _name(place: tuple[int, int]) -> str:
    return f"{place[0]:06d}.{place[1]}"


def _masks(spec: RunSpec, store: FeatureStore, subsets: Sequence[int]) -> np.ndarray:
    """Which rows of the train set are in each of some subsets, [s, rows]; those that are not valid are in none."""
    from gradstore.numerics.metrics import subset_mask

    rows = valid_rows_of(store, "train")
    masks_SN = np.zeros((len(subsets), store.open_set("train").info.rows), bool)
    for mask_N, subset in zip(masks_SN, subsets, strict=True):
        mask_N[rows] = subset_mask(subset, len(rows), share=section_of(spec).share, seed=spec.run.seed)
    return masks_SN


def _of_set(table: pa.Table, name: str) -> np.ndarray:
    return np.array(
        [value for of, value in zip(table["set"].to_pylist(), table["output"].to_pylist(), strict=True) if of == name]
    )


def _averaged(outputs: Sequence[np.ndarray], seeds: int) -> np.ndarray:
    stacked = np.stack(outputs)
    averaged: np.ndarray = stacked.reshape(-1, seeds, stacked.shape[1]).mean(1)
    return averaged
