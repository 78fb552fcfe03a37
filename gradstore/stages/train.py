"""train: the model that a run attributes, made of its train examples by the trainer of [training]."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gradstore.adapters import Adapter
from gradstore.adapters.training import Saved, Trainer, TrainsAlone, outputs_of, resolve_trainer, trainer_settings
from gradstore.errors import SpecError, StorageError
from gradstore.numerics.generator import derive_key
from gradstore.plan.resolve import make_adapter, resolve_device
from gradstore.spec import RunSpec
from gradstore.spec.sections import LONE_MEMBER
from gradstore.stages.output import replacing
from gradstore.stages.progress import Progress
from gradstore.store.codecs import plain
from gradstore.store.contract import require_equal
from gradstore.store.examples import Example, data_hash

_RECORD: Final = ".training.json"
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
    trainer = resolve_trainer(spec.training.trainer, spec.training.options)
    # Members that are one model seen otherwise, as at several timesteps, are trained once.
    members = {_place(make_adapter(spec, member), force=force): member for member in reversed(spec.model.etas)}
    told = []
    with progress.stage("train", len(members), "models") as advance:
        for place, member in reversed(members.items()):
            found = _train(spec, member, trainer, place, force=force)
            told.append({"member": member, "model": str(place), **found})
            advance(1)
    return told


def _place(adapter: Adapter, *, force: bool) -> Path:
    if not isinstance(adapter, Saved):
        raise SpecError(f"model.adapter: {type(adapter).__name__} does not say how a model that was trained is kept.")
    place = adapter.saved_place()
    if place.exists() and not _record(place).exists() and not force:
        raise SpecError(
            f"{place}: is there, and `gradstore train` did not make it. Name another place in [model], or give --force."
        )
    return place


def _train(spec: RunSpec, member: str, trainer: Trainer, place: Path, *, force: bool) -> dict[str, Any]:
    """Train the model of one member, unless it is there."""
    adapter = make_adapter(_anew(spec), member)
    examples = _examples(adapter)
    own = spec.model.of_member(member)
    # The name tells apart those that have a place of their own.
    drawn_by = LONE_MEMBER if (own.weights, own.source) == (spec.model.weights, spec.model.source) else member
    made_from = plain(
        {
            **trainer_settings(spec.training.trainer, spec.training.options),
            "base": spec.training.base,
            "seed": spec.run.seed,
            "member": drawn_by,
            "model": {key: value for key, value in adapter.identity().items() if key not in _SEEN_AS},
            "train": data_hash(examples["train"]),
        }
    )
    if place.exists() and _record(place).exists() and not force:
        remedy = "Restore these settings, name another place in [model], or give --force, which trains anew."
        stored = json.loads(_record(place).read_text(encoding="utf-8"))
        require_equal(f"The model {place}", stored["made_from"], made_from, remedy=remedy)
        return {**stored["facts"], "kept": True}
    began = time.monotonic()
    seed, device = derive_key(spec.run.seed, "train", drawn_by) % 2**63, resolve_device(spec)
    model = trainer(adapter, examples["train"], seed=seed, device=device)
    facts = {
        "examples": len(examples["train"]),
        "seconds": round(time.monotonic() - began, 3),
        "output": {name: float(outputs_of(adapter, model, rows).mean()) for name, rows in examples.items()},
    }
    _write(adapter, model, place, {"made_from": made_from, "facts": facts})
    return {**facts, "kept": False}


def _examples(adapter: Adapter) -> Mapping[str, Sequence[Example]]:
    """The train examples, and those of other splits where no model has to make them."""
    return {"train": adapter.training_examples()} if isinstance(adapter, TrainsAlone) else adapter.examples().splits


def _anew(spec: RunSpec) -> RunSpec:
    """The run as it is before there is a model."""
    section = spec.model.model_copy(update={"weights": None, "source": spec.training.base or spec.model.source})
    gone = {"weights": None} | ({} if spec.training.base is None else {"source": None})
    members = [member.model_copy(update=gone) for member in section.members]
    return spec.model_copy(update={"model": section.model_copy(update={"members": members})})


def _write(adapter: Adapter, model: Any, place: Path, record: Mapping[str, Any]) -> None:
    """Write a model in the place of another, and the record last."""
    assert isinstance(adapter, Saved), "others were refused"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _record(place).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{place}: cannot be written: {error.strerror or error}.") from error
    with replacing(place) as temporary:
        adapter.save(model, temporary)
    with replacing(_record(place)) as temporary:
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _record(place: Path) -> Path:
    return place.with_name(place.name + _RECORD)
