"""train: the model that a run attributes, made of its train examples by the trainer of [training]."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gradstore.adapters import Adapter
from gradstore.adapters.training import (
    AIRREP,
    Trainer,
    TrainsAlone,
    hash_of_base,
    outputs_of,
    resolve_trainer,
    trainer_settings,
)
from gradstore.numerics.generator import derive_key
from gradstore.plan.resolve import make_adapter, resolve_device
from gradstore.spec import RunSpec
from gradstore.spec.sections import LONE_MEMBER
from gradstore.stages.progress import Progress
from gradstore.stages.train_encoder import train_encoder
from gradstore.stages.trained import kept, place_of, write_model
from gradstore.store.codecs import plain
from gradstore.store.examples import Example, data_hash

# What of an adapter's identity says how a model is looked at, not what it is.
_SEEN_AS: Final = ("output", "copies")


def train_model(spec: RunSpec, progress: Progress, *, force: bool = False) -> list[dict[str, Any]]:
    """Train the model of every member that is not there, and write it where [model] looks for it; return what was done.

    Beside it a file ``.training.json`` says what it was made from, by which the same command knows it again.

    Raises
    ------
    SpecError
        If there is no such trainer, or [model] names no place for the model.
    ContractError
        If there is a model that was made otherwise, and ``force`` does not say that it may go.
    StorageError
        If it cannot be written.
    """
    if spec.training.trainer == AIRREP:
        return [train_encoder(spec, progress, force=force)]
    trainer = resolve_trainer(spec.training.trainer, spec.training.options)
    # Members that are one model seen otherwise, as at several timesteps, are trained once.
    members = {place_of(make_adapter(spec, member), force=force): member for member in reversed(spec.model.etas)}
    told = []
    with progress.stage("train", len(members), "models") as advance:
        for place, member in reversed(members.items()):
            found = _train(spec, member, trainer, place, force=force)
            told.append({"member": member, "model": str(place), **found})
            advance(1)
    return told


def _train(spec: RunSpec, member: str, trainer: Trainer, place: Path, *, force: bool) -> dict[str, Any]:
    """Train the model of one member, unless it is there."""
    adapter = make_adapter(spec.untrained(), member)
    examples = _examples(adapter)
    own = spec.model.of_member(member)
    # The name tells apart those that have a place of their own.
    drawn_by = LONE_MEMBER if (own.weights, own.source) == (spec.model.weights, spec.model.source) else member
    made_from = plain(
        {
            **trainer_settings(spec.training.trainer, spec.training.options),
            "base": hash_of_base(spec.training.base),
            "seed": spec.run.seed,
            "member": drawn_by,
            "model": {key: value for key, value in adapter.identity().items() if key not in _SEEN_AS},
            "train": data_hash(examples["train"]),
        }
    )
    if (told := kept(place, made_from, force=force)) is not None:
        return {**told, "kept": True}
    began = time.monotonic()
    seed, device = derive_key(spec.run.seed, "train", drawn_by) % 2**63, resolve_device(spec)
    model = trainer(adapter, examples["train"], seed=seed, device=device)
    facts = {
        "examples": len(examples["train"]),
        "seconds": round(time.monotonic() - began, 3),
        "output": {name: float(outputs_of(adapter, model, rows).mean()) for name, rows in examples.items()},
    }
    write_model(adapter, model, place, {"made_from": made_from, "facts": facts})
    return {**facts, "kept": False}


def _examples(adapter: Adapter) -> Mapping[str, Sequence[Example]]:
    """The train examples, and those of other splits where no model has to make them."""
    return {"train": adapter.training_examples()} if isinstance(adapter, TrainsAlone) else adapter.examples().splits
