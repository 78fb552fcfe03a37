"""What is learned: the candidates that run.toml asks for, and the settings that tell weights apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gradstore.spec import RunSpec
from gradstore.spec.learning import BEGINS_AT
from gradstore.stages.pairs import hash_pairs, read_pairs

if TYPE_CHECKING:
    from gradstore.numerics.scores import Transform


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Settings of one weight vector, among which held-out queries choose."""

    k: int
    weight_decay: float
    seed: int


def candidates_of(spec: RunSpec) -> list[Candidate]:
    """Every k with every weight decay and seed, in this order: among equals the first is taken."""
    learn, seed = spec.learn, seed_of(spec)
    return [
        Candidate(k=k, weight_decay=decay, seed=seed + number)
        for k in learn.ks
        for decay in learn.weight_decays
        for number in range(learn.restarts)
    ]


def seed_of(spec: RunSpec) -> int:
    """The seed of the first restart, of the choice of held-out queries and of noise."""
    return spec.run.seed if spec.learn.seed is None else spec.learn.seed


def told_settings(spec: RunSpec) -> dict[str, Any]:
    """What run.toml says of the weights: of newer keys only those that are not at their default.

    So weights that were learned before a key was there are still those of a run that does not set it.
    """
    learn = spec.learn
    found: dict[str, Any] = {"k": learn.k, "objective": learn.objective}
    if learn.solver != "closed_form":
        found["weight_decay"] = learn.weight_decay
    if learn.solver == "algorithm_1":
        found |= {"epochs": learn.epochs, "learning_rate": learn.learning_rate}
    else:
        found["solver"] = learn.solver
    if learn.solver == "algorithm_1" or learn.begins_at == "random" or learn.share_held_out or learn.noise:
        found["seed"] = seed_of(spec)
    newer = {
        "start": learn.begins_at if learn.begins_at != BEGINS_AT[learn.solver] else None,
        "restarts": learn.restarts if learn.restarts > 1 else None,
        "held_out": learn.share_held_out or None,
        "noise": learn.noise or None,
        "pairs": None if learn.pairs is None else hash_pairs(read_pairs(learn.pairs, "learn.pairs")),
    }
    return found | {key: value for key, value in newer.items() if value is not None}


def full_settings(spec: RunSpec, *, tile: int, transform: Transform) -> dict[str, Any]:
    """The same, with what follows from C: ``transform``, and of Algorithm 1 ``tile``, on which the order of visits depends."""
    of_steps = {"tile": tile} if spec.learn.solver == "algorithm_1" else {}
    return {**told_settings(spec), **of_steps, "transform": transform}


def told_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Of settings that a store has, those that do not follow from C."""
    return {key: value for key, value in stored.items() if key not in ("tile", "transform")}
