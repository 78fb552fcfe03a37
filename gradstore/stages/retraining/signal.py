"""The models of [signal]: trained from one start on small subsets, neighbourhoods of learn queries among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Final

import numpy as np

from gradstore.adapters import Represents
from gradstore.cluster import Engine
from gradstore.errors import ContractError, NotReadyError, SpecError
from gradstore.numerics.generator import derive_key, permutation, words
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec
from gradstore.stages.contributions import valid_rows_of
from gradstore.stages.embeddings import has_embeddings, similarities
from gradstore.stages.progress import Progress
from gradstore.stages.retraining.models import (
    SETS,
    Asked,
    Chosen,
    averaged,
    common_settings,
    folder_of,
    output_of,
    train_missing,
)
from gradstore.store.artifacts import RetrainedArtifact, list_artifacts
from gradstore.store.codecs import plain
from gradstore.store.features import FeatureStore

_KEY: Final = "signal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """What models output for the learn queries that were trained on small subsets.

    Attributes
    ----------
    subsets
        [S, n]: the train rows of each.
    outcomes
        [S, Q]: f of each learn query, larger is better, averaged over the models of a subset; NaN of queries that are not valid.
    settings
        What the models have in common.
    """

    subsets: np.ndarray
    outcomes: np.ndarray
    settings: Mapping[str, Any]


def make_signal(spec: RunSpec, engine: Engine, progress: Progress) -> dict[str, Any]:
    """Train the models that are missing of those that [signal] asks for, and tell what there is.

    They are kept at ``retrained/<name>``, one artifact each, whose settings hold the rows of its subset.

    Raises
    ------
    SpecError
        If there are too few examples, neighbours cannot be told, or the run has no model that could be trained.
    NotReadyError
        If there are no examples in the store yet.
    ContractError
        If models of this name were trained otherwise.
    """
    if isinstance(make_adapter(spec), Represents):
        raise SpecError(
            f"{_KEY}: a run of representations has no model that is trained on examples. Give the run.toml of the attributed model."
        )
    section, store = spec.signal, FeatureStore.open(spec.run.store)
    subsets = _subsets(spec, store, engine, progress)
    settings = {
        **{key: getattr(section, key) for key in ("examples", "local")},
        "neighbours": _neighbours(spec) if section.local else None,
        **common_settings(spec, output_of(spec, store)),
        **{name: store.describe(name) for name in SETS},
    }
    asked = [
        Asked(
            url=store.storage.url,
            name=section.name,
            place=(subset, seed),
            settings={**settings, "subset": subset, "seed": seed, "rows": rows.tolist()},
            subset=Chosen(rows=rows.tolist()),
            # The same for all subsets: what models differ by is their examples.
            seed=derive_key(spec.run.seed, "signal", f"training {seed}") % 2**63,
        )
        for subset, rows in enumerate(subsets)
        for seed in range(section.seeds)
    ]
    train_missing(spec, asked, engine, progress)
    found = read_signal(store, section.name)
    return {
        "store": spec.run.store,
        "signal": section.name,
        "subsets": len(found.subsets),
        "examples": section.examples,
        "seeds": section.seeds,
        "queries": int(np.isfinite(found.outcomes).all(0).sum()),
    }


def read_signal(store: FeatureStore, name: str) -> Signal:
    """Read the models of a name.

    Raises
    ------
    NotReadyError
        If there are none, or one is not trained yet.
    ContractError
        If they are of several kinds, or models of [evaluate.lds].
    """
    found = [
        artifact
        for artifact in list_artifacts(store.storage)
        if artifact.kind == RetrainedArtifact.kind and artifact.name.rpartition("/")[0] == name
    ]
    where = f"{store.storage.url}/retrained/{name}"
    done = [artifact for artifact in found if artifact.committed == artifact.total]
    if not found or len(done) < len(found):
        state = f"{len(done):,} of {len(found):,} models are trained" if found else "there are no such models"
        raise NotReadyError(f"{where}: {state}. Run `gradstore signal` of the attributed model's run first.")
    if any("rows" not in artifact.settings for artifact in found):
        raise ContractError(f"{where}: are models of evaluate.lds, trained on other subsets. Name models of [signal].")
    places = {(artifact.settings["subset"], artifact.settings["seed"]): artifact for artifact in found}
    numbers = sorted({subset for subset, _ in places})
    # Of a subset there may be more than were last asked for.
    seeds = min(next(seed for seed in count() if (subset, seed) not in places) for subset in numbers)
    if not seeds:
        raise NotReadyError(
            f"{where}: a subset has no first model. Run `gradstore signal` of the attributed model's run first."
        )
    artifacts = [
        RetrainedArtifact.open(store.storage, name, folder_of((subset, seed)))
        for subset in numbers
        for seed in range(seeds)
    ]
    own = ("subset", "seed", "rows")
    common = {key: value for key, value in artifacts[0].settings.items() if key not in own}
    return Signal(
        subsets=np.array([places[subset, 0].settings["rows"] for subset in numbers], np.int64),
        outcomes=averaged(artifacts, seeds)["learn"],
        settings=plain(common),
    )


def _neighbours(spec: RunSpec) -> int:
    return spec.signal.neighbours or 2 * spec.signal.examples


def _subsets(spec: RunSpec, store: FeatureStore, engine: Engine, progress: Progress) -> list[np.ndarray]:
    """The rows of every subset, ascending; those of models that are there stay what they are."""
    section = spec.signal
    valid_N, queries = valid_rows_of(store, "train"), valid_rows_of(store, "learn")
    from_N = min(_neighbours(spec), len(valid_N)) if section.local else len(valid_N)
    if not section.examples < from_N:
        where = "neighbours" if section.local else "train examples"
        raise SpecError(
            f"{_KEY}.examples: found {section.examples}, with {from_N:,} {where} to draw them from; accepted: fewer than these."
        )
    if section.local and not has_embeddings(spec):
        raise SpecError(
            f"{_KEY}.local: found {section.local}, and the run has no embeddings by which examples were neighbours. Name an encoder "
            f"in evaluate.encoder, or set {_KEY}.local = 0."
        )
    kept = {subset: _kept(store, section.name, subset) for subset in range(section.subsets)}
    similar = (
        similarities(spec, store, engine, progress, of="learn")
        if section.local and any(rows is None for rows in kept.values())
        else None
    )

    def draw(subset: int) -> np.ndarray:
        pool = valid_N
        # Spread evenly, so that more subsets leave the first ones as they are.
        if similar is not None and int((subset + 1) * section.local) > int(subset * section.local):
            (drawn,) = words(derive_key(spec.run.seed, _KEY, f"query {subset}"), 1)
            nearest = np.argsort(-similar[queries[int(drawn) % len(queries)], valid_N], kind="stable")
            pool = np.sort(valid_N[nearest[: _neighbours(spec)]])
        order = permutation(words(derive_key(spec.run.seed, _KEY, f"subset {subset}"), len(pool)))
        return np.asarray(pool[order < section.examples])

    return [draw(subset) if rows is None else rows for subset, rows in kept.items()]


def _kept(store: FeatureStore, name: str, subset: int) -> np.ndarray | None:
    """The rows of a subset of which a model is there, or asked for; None if none is.

    What is similar is told in floating point, and may differ in its last bits on another machine.
    """
    artifact = RetrainedArtifact.find_named(store.storage, name, folder_of((subset, 0)))
    if artifact is None or "rows" not in artifact.settings:
        return None
    return np.array(artifact.settings["rows"], np.int64)
