"""learn: C -> w[j]. Fits one weight per parameter group to the contributions of the learn queries."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstore.cluster import Engine
from gradstore.cluster.tasks import one_thread
from gradstore.errors import ContractError, DataError, SpecError
from gradstore.plan.sizes import learner_tile
from gradstore.spec import RunSpec, key_of
from gradstore.stages.building import open_contributions
from gradstore.stages.contributions import Reads, valid_rows_of
from gradstore.stages.learn.choice import Choice, choose, hold_out
from gradstore.stages.learn.methods import Problem, moments_of, solve
from gradstore.stages.learn.reading import LearnedFrom
from gradstore.stages.learn.settings import Candidate, candidates_of, full_settings, seed_of, told_of, told_settings
from gradstore.stages.learn.tables import candidates_table, trajectory_table, weights_table
from gradstore.stages.pairs import read_pairs, rows_of_pairs
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.backend import Storage
from gradstore.store.contract import require_equal
from gradstore.store.features import FeatureStore


def learn(spec: RunSpec, engine: Engine, progress: Progress) -> None:
    """Write the weights of every kernel of a sweep and every set to learn from its own, as `LearnSection` says.

    Those that the store holds are left as they are.

    Raises
    ------
    NotReadyError
        If contributions are missing, or what they are built from.
    SpecError
        If k is larger than the number of train examples.
    DataError
        If there are no queries to learn from, or too few to hold some out, or pairs are of unknown examples.
    ContractError
        If weights of this name were learned otherwise.
    ResourceError
        If rows of C do not fit ``learn.memory`` and the solver cannot do without them.
    """
    del engine  # learning is light: it streams C in this process
    store = FeatureStore.open(spec.run.store)
    for swept in spec.sweep():
        for target in swept.learn_targets():
            _learn(swept, store, target, progress)


def _learn(spec: RunSpec, store: FeatureStore, target: tuple[str, str], progress: Progress) -> None:
    """Learn the weights of a target: from a set of queries, under a name."""
    set_name, name = target
    contributions = open_contributions(spec, store, set_name)
    _refuse_large_k(spec, len(contributions.valid_rows()))
    held_out = hold_out(_valid_queries(store, set_name), spec.learn.share_held_out, seed_of(spec))
    queries = np.setdiff1d(np.arange(contributions.shape.queries), held_out)
    transform = contributions.settings["transform"]
    tile = learner_tile((len(queries), contributions.shape.rows, len(contributions.shape.groups)))
    settings = {
        **_made_from(spec, set_name, full_settings(spec, tile=tile, transform=transform)),
        "contributions": dict(contributions.settings),
    }
    # Weights that were learned otherwise are refused before any are; and none leave a name behind that were not found.
    existing = WeightsArtifact.find_named(store.storage, name)
    if existing is not None and WeightsArtifact.create(store.storage, name, settings=settings).is_complete():
        return
    started = time.monotonic()
    reads = Reads(contributions, progress, "learn")
    problem = _problem(spec, store, set_name, LearnedFrom(reads, queries), tile)
    found = solve(problem, progress)
    with one_thread():
        weights_VM = np.stack([each.weights for each in found])
        choice = choose(reads, weights_VM, spec.learn.ks, held_out=held_out, transform=transform)
    taken = found[choice.place]
    of_epochs = sum(each.facts["reads"] for each in found if each.facts["method"] == "streamed")
    facts = {**taken.facts, "reads_in_all": reads.count + of_epochs, "seconds": time.monotonic() - started}
    arrays = {array.name: array for array in store.open_set("train").info.arrays}
    WeightsArtifact.create(store.storage, name, settings=settings).write(
        weights_table([arrays[group] for group in contributions.shape.groups], taken.weights),
        trajectory_table(taken.steps, queries),
        None if choice.gains is None else candidates_table(problem.candidates, found, choice),
        facts=facts if choice.gains is None else {**facts, "held_out": held_out.tolist()},
    )
    if choice.gains is not None:
        _tell_choice(name, problem.candidates, choice, progress)


def _valid_queries(store: FeatureStore, set_name: str) -> np.ndarray:
    """Numbers of the queries of a set that are valid, of which there is one at least."""
    valid = valid_rows_of(store, set_name)
    if not len(valid):
        raise DataError(
            f"{store.storage.url}/features/{set_name}: no query has valid features, so that there is nothing to learn from. See "
            f"{key_of(set_name)}."
        )
    return valid


def _tell_choice(name: str, candidates: Sequence[Candidate], choice: Choice, progress: Progress) -> None:
    assert choice.gains is not None, "candidates are judged"
    taken = candidates[choice.place]
    progress.note(
        f"{name}: of {len(candidates)} candidates k = {taken.k}, weight_decay = {taken.weight_decay:g}, seed = {taken.seed} was "
        f"taken, which raises the top scores of held-out queries to {choice.gains[choice.place]:.3f} times those of uniform weights"
    )


def _positives(spec: RunSpec, store: FeatureStore, set_name: str) -> list[np.ndarray] | None:
    """Rows of the train set that are to score best for each query of a set; None where no pairs are asked for.

    A file may have pairs for all sets that weights are learned from.
    """
    path = spec.learn.pairs
    if path is None:
        return None
    others = [name for name in spec.data.learn_sets() if name != set_name]
    found = rows_of_pairs(store, read_pairs(path, "learn.pairs"), set_name, others)
    if not any(map(len, found)):
        raise DataError(f"{path}: holds no pairs of queries of {set_name}, from which weights are to be learned.")
    return found


def _problem(spec: RunSpec, store: FeatureStore, set_name: str, learned_from: LearnedFrom, tile: int) -> Problem:
    contributions = learned_from.reads.contributions
    positives = _positives(spec, store, set_name)
    moments = moments_of(store.storage, spec.kernel.name, set_name, contributions)
    if spec.learn.noise:
        # What was summed of C without noise is of another C.
        moments = None
        _add_noise(spec, learned_from)
    return Problem(
        learn=spec.learn,
        candidates=candidates_of(spec),
        learned_from=learned_from,
        moments=moments,
        positives=None if positives is None else [positives[query] for query in learned_from.queries],
        tile=tile,
        transform=contributions.settings["transform"],
    )


def _add_noise(spec: RunSpec, learned_from: LearnedFrom) -> None:
    """Have C read with noise of ``learn.noise`` times the deviation of each group's contributions, which a read finds."""
    from gradstore.numerics.learner import deviations, noisy

    with one_thread():
        deviation_M = spec.learn.noise * deviations(learned_from.read)
    learned_from.noise = lambda read: noisy(read, deviation_M, seed_of(spec))


def _refuse_large_k(spec: RunSpec, valid: int) -> None:
    if spec.learn.objective != "pairs" and max(spec.learn.ks) > valid:
        raise SpecError(
            f"learn.k: found {max(spec.learn.ks)}; accepted: at most the {valid} train examples that are valid."
        )


def refuse_other_weights(spec: RunSpec, storage: Storage) -> None:
    """Refuse names of weights that a store has already with other settings: as far as is known before there is any C.

    Raises
    ------
    ContractError
        Naming the settings that differ.
    """
    for swept, (set_name, name) in ((run, target) for run in spec.sweep() for target in run.learn_targets()):
        # Of pairs this tells what is wrong with their file.
        told = told_settings(swept)
        artifact = WeightsArtifact.find_named(storage, name)
        if artifact is None:
            continue
        if "transferred_from" in artifact.settings:
            raise ContractError(
                f"learn.name: the artifact {storage.url}/{artifact.folder} was taken from "
                f"{artifact.settings['transferred_from']['store']}. Choose another learn.name, and rank by it with score.weights."
            )
        learner = told_of(artifact.settings["learner"])
        require_equal(
            f"learn.name: the artifact {storage.url}/{artifact.folder}",
            {key: artifact.settings.get(key) for key in ("kernel", "queries")} | {"learner": learner},
            _made_from(swept, set_name, told),
            remedy=f"Restore these settings, choose another learn.name, or run `gradstore prune {storage.url} "
            f"{artifact.folder}`: the run then learns anew.",
        )


def _made_from(spec: RunSpec, set_name: str, learner: Mapping[str, Any]) -> dict[str, Any]:
    """What weights are made from, but for the contributions."""
    return {"learner": learner, "kernel": spec.kernel.name, "queries": set_name}
