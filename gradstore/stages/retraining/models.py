"""Models that are trained on subsets of the train set: one task and one artifact for each, so that none is trained twice."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gradstore.adapters.training import FINE_TUNE, hash_of_base, outputs_of, resolve_trainer, trainer_settings
from gradstore.cluster import Engine, Task
from gradstore.errors import DataError, SupersededError
from gradstore.plan.resolve import make_adapter, resolve_device
from gradstore.spec import RunSpec
from gradstore.stages.contributions import valid_rows_of
from gradstore.stages.featurize.tables import MARGIN
from gradstore.stages.progress import Progress
from gradstore.stages.reading import examples_at
from gradstore.store.artifacts import RetrainedArtifact
from gradstore.store.blocks import in_parallel
from gradstore.store.codecs import plain
from gradstore.store.examples import Example
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    from torch import nn

    from gradstore.adapters import Adapter

# Damping and the like are chosen by queries of learn, so that none is by those that are reported.
QUERY_SETS: Final = ("learn", "eval")
SETS: Final = ("train", *QUERY_SETS)
# Output function of diffusion models that is a loss.
_ERROR: Final = "ddpm_simple"

Place = tuple[int, int]
"""(subset, seed) of a model."""


def folder_of(place: Place) -> str:
    """Return the name of a model's artifact among those of its kind."""
    subset, seed = place
    return f"{subset:06d}.{seed}"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Half:
    """A random share of the valid train rows, that follows from the run's seed and the number of the subset alone."""

    share: float
    subset: int

    def among(self, valid_N: np.ndarray, seed: int) -> np.ndarray:
        """Those of the valid rows that are in it."""
        from gradstore.numerics.metrics import subset_mask

        return np.asarray(valid_N[subset_mask(self.subset, len(valid_N), share=self.share, seed=seed)])


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Some train rows that are few."""

    rows: Sequence[int]

    def among(self, valid_N: np.ndarray, seed: int) -> np.ndarray:
        """These, which were valid when they were chosen."""
        del valid_N, seed
        return np.asarray(self.rows, np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One model that is to be trained.

    Attributes
    ----------
    url
        The store that keeps what it outputs.
    name, place
        What models of its kind are called, and which of them it is.
    settings
        All that tells it from others.
    subset
        What it is trained on.
    seed
        Of its training.
    """

    url: str
    name: str
    place: Place
    settings: Mapping[str, Any]
    subset: Half | Chosen
    seed: int

    @property
    def folder(self) -> str:
        """Name of its artifact among those of its kind."""
        return folder_of(self.place)


def train_missing(
    spec: RunSpec, asked: Sequence[Asked], engine: Engine, progress: Progress
) -> Sequence[RetrainedArtifact]:
    """Train those models that are missing, and return the artifacts of all.

    Raises
    ------
    SpecError
        If there is no such trainer.
    ContractError
        If models of this name were trained otherwise.
    """
    resolve_trainer(spec.training.trainer, spec.training.options)
    storages = {model.url: FeatureStore.open(model.url).storage for model in asked}
    artifacts = [
        RetrainedArtifact.create(storages[model.url], model.name, model.folder, settings=model.settings)
        for model in asked
    ]
    missing = [model for model, artifact in zip(asked, artifacts, strict=True) if not artifact.is_complete()]
    run = spec.model_dump()
    tasks = [
        Task(
            name=f"retrain-{number:06d}",
            function=train_on_subset,
            arguments=(spec.run.store, run, model),
            resources=spec.cluster.model_resources,
        )
        for number, model in enumerate(missing)
    ]
    if tasks:
        with progress.stage(f"retrain {asked[0].name}", len(asked), "models", len(asked) - len(tasks)) as advance:
            for _ in engine.run(tasks):
                advance(1)
    return artifacts


def train_on_subset(store_url: str, run: Mapping[str, Any], model: Asked) -> None:
    """Task: train one model, and commit what it outputs for every query.

    Raises
    ------
    SupersededError
        If the models of this name are of other settings: a task of an earlier run may wait on a scheduler still.
    DataError
        If an output is not finite.
    """
    spec, store = RunSpec.model_validate(run), FeatureStore.open(store_url)
    artifact = RetrainedArtifact.open(FeatureStore.open(model.url).storage, model.name, model.folder)
    if artifact.is_complete():
        return
    if artifact.settings != plain(model.settings):
        raise SupersededError(
            f"{artifact.folder}: is of other settings than this task's. Run the command that trains it again."
        )
    began = time.monotonic()
    rows = model.subset.among(valid_rows_of(store, "train"), spec.run.seed)
    examples = examples_at(store.open_set("train"), rows.tolist())
    output = str(model.settings["output"])
    # That of the features needs no mention, which some adapters do not take.
    asked = spec.model.output if output == store.contract["model"]["output"] else output
    of_output = spec.model_copy(update={"model": spec.model.model_copy(update={"output": asked})})
    adapter = make_adapter(of_output.untrained() if spec.training.trainer == FINE_TUNE else of_output)
    trainer = resolve_trainer(spec.training.trainer, spec.training.options)
    made = trainer(adapter, examples, seed=model.seed, device=resolve_device(spec))
    found = {name: _outputs(adapter, made, store, name) for name in QUERY_SETS}
    table = pa.table(
        {
            "set": pa.array([name for name, values in found.items() for _ in values], pa.string()),
            "query": pa.array([query for values in found.values() for query in range(len(values))], pa.int64()),
            "output": pa.array(np.concatenate([*found.values()]), pa.float64()),
        }
    )
    artifact.write(table, facts={"examples": len(examples), "seconds": time.monotonic() - began})


def common_settings(spec: RunSpec, asked: str) -> dict[str, Any]:
    """What all models of a name have in common: their trainer, where that begins, the seed of all draws, and what they are asked."""
    begins = {"start": hash_of_base(spec.training.base)} if spec.training.trainer == FINE_TUNE else {}
    return {
        **trainer_settings(spec.training.trainer, spec.training.options),
        **begins,
        "run_seed": spec.run.seed,
        "output": asked,
    }


def output_of(spec: RunSpec, store: FeatureStore) -> str:
    """The output function of which retrained models are asked, unless the run says otherwise."""
    return _ERROR if spec.model.adapter == "diffusion" else str(store.contract["model"]["output"])


def averaged(artifacts: Sequence[RetrainedArtifact], seeds: int) -> dict[str, np.ndarray]:
    """Return, by query set, [S, Q]: what the models of artifacts output, larger is better, the mean of the seeds of every subset.

    Artifacts come subset by subset.

    Raises
    ------
    DataError
        If models output something of different numbers of queries.
    """
    sign = 1.0 if artifacts[0].settings["output"] == MARGIN else -1.0
    tables = in_parallel(RetrainedArtifact.read, artifacts, threads=artifacts[0].storage.concurrency)
    found = {}
    for name in QUERY_SETS:
        of_models = [table.filter(pc.equal(table["set"], name))["output"].to_numpy() for table in tables]
        if len({len(of_model) for of_model in of_models}) > 1:
            folder = artifacts[0].folder.rpartition("/")[0]
            raise DataError(
                f"{folder}: its models output something of different numbers of queries of {name}. Remove them with `gradstore prune`, and "
                "train them again."
            )
        found[name] = sign * np.stack(of_models).reshape(-1, seeds, len(of_models[0])).mean(1)
    return found


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
