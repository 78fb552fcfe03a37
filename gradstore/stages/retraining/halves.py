"""The models of [evaluate.lds]: trained on random shares of the train set, which follow from the seed of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from gradstore.adapters import Represents
from gradstore.cluster import Engine
from gradstore.errors import NotReadyError, SpecError
from gradstore.numerics.generator import derive_key
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec, content_hash
from gradstore.spec.evaluation import DatamodelingSection
from gradstore.stages.contributions import valid_rows_of
from gradstore.stages.progress import Progress
from gradstore.stages.retraining.models import (
    SETS,
    Asked,
    Half,
    Retrained,
    averaged,
    common_settings,
    folder_of,
    output_of,
    train_missing,
)
from gradstore.store.artifacts import RetrainedArtifact
from gradstore.store.contract import require_equal
from gradstore.store.features import FeatureStore

KEY: Final = "evaluate.lds"


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


def lds_outputs(spec: RunSpec, engine: Engine, progress: Progress) -> Retrained:
    """Train the models that are missing of those that [evaluate.lds] asks for, and read what all of them output.

    A run whose features are representations trains none: those of the attributed model's run are read.

    Raises
    ------
    SpecError
        If there is no [evaluate.lds], or no such trainer; or of a run of representations no store of the attributed model's.
    NotReadyError
        If models of that are missing.
    ContractError
        If models of this name were trained otherwise.
    """
    section = section_of(spec)
    store = FeatureStore.open(spec.run.store)
    keeper = _keeper(spec, store)
    if isinstance(make_adapter(spec), Represents):
        artifacts = _of_attributed(spec, keeper)
    else:
        artifacts = train_missing(spec, _asked(spec, store, keeper), engine, progress)
    masks_SN = np.zeros((section.subsets, store.open_set("train").info.rows), bool)
    valid_N = valid_rows_of(store, "train")
    for subset, mask_N in enumerate(masks_SN):
        mask_N[Half(share=section.share, subset=subset).among(valid_N, spec.run.seed)] = True
    return Retrained(masks=masks_SN, outputs=averaged(artifacts, section.seeds))


def _asked(spec: RunSpec, store: FeatureStore, keeper: FeatureStore) -> list[Asked]:
    section = section_of(spec)
    settings = {
        "share": section.share,
        **common_settings(spec, section.output or output_of(spec, store)),
        **{name: keeper.describe(name) for name in SETS},
    }
    return [
        Asked(
            url=keeper.storage.url,
            name=section.name,
            place=(subset, seed),
            settings={**settings, "subset": subset, "seed": seed},
            subset=Half(share=section.share, subset=subset),
            seed=derive_key(spec.run.seed, "lds", f"training {subset} {seed}") % 2**63,
        )
        for subset in range(section.subsets)
        for seed in range(section.seeds)
    ]


def _of_attributed(spec: RunSpec, keeper: FeatureStore) -> Sequence[RetrainedArtifact]:
    """The models of the attributed model's run, which must all be there."""
    section = section_of(spec)
    if keeper.storage.url == FeatureStore.open(spec.run.store).storage.url:
        raise SpecError(
            f"{KEY}.store: is missing; representations are measured by models that the run of the attributed model has trained. Name "
            "its store."
        )
    found = []
    for place in ((subset, seed) for subset in range(section.subsets) for seed in range(section.seeds)):
        name = folder_of(place)
        artifact = RetrainedArtifact.find_named(keeper.storage, section.name, name)
        if artifact is None or not artifact.is_complete():
            raise NotReadyError(
                f"{keeper.storage.url}/retrained/{section.name}/{name}: is not trained. Run `gradstore evaluate lds` of the attributed "
                f"model's run first, with subsets = {section.subsets} and seeds = {section.seeds}."
            )
        theirs = {key: artifact.settings[key] for key in ("share", "run_seed")}
        remedy = f"Give {KEY}.share and run.seed as the run of that store has them."
        require_equal(
            f"{keeper.storage.url}", theirs, {"share": section.share, "run_seed": spec.run.seed}, remedy=remedy
        )
        found.append(artifact)
    return found


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
    remedy = f"Leave {KEY}.store out: models are then trained for this run."
    require_equal(f"{KEY}.store: {keeper.storage.url}", examples_of(keeper), examples_of(store), remedy=remedy)
    return keeper


def examples_of(store: FeatureStore) -> Mapping[str, Any]:
    """What tells the examples of every set that models are trained on, or asked for."""
    return {
        name: {
            "data": store.open_set(name).info.data_hash,
            "valid": content_hash(valid_rows_of(store, name).tolist()),
        }
        for name in SETS
    }
