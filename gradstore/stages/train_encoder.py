"""train, with trainer airrep: an encoder of texts, from what models output that were trained on subsets."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from gradstore.adapters.encoder import TextEncoder
from gradstore.adapters.training import AIRREP, hash_of_base
from gradstore.errors import DataError, SpecError
from gradstore.numerics.generator import derive_key
from gradstore.plan.resolve import make_adapter, resolve_device
from gradstore.spec import RunSpec, content_hash, resolve_kind
from gradstore.stages.output import replacing
from gradstore.stages.progress import Progress
from gradstore.stages.reading import examples_at
from gradstore.stages.retraining import Signal, read_signal
from gradstore.stages.trained import kept, place_of, write_model
from gradstore.store.codecs import plain
from gradstore.store.contract import require_equal
from gradstore.store.examples import data_hash
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    from torch import nn

    from gradstore.numerics.representation.fitting import Fitted, Fitting, FittingSettings, Lesson
    from gradstore.numerics.representation.model import Representation

_KEY: Final = "training.options"
_CHECKPOINT: Final = ".checkpoint.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """Of [training.options] what says where the signal is: the store of the attributed model's run, and its name there."""

    store: str
    signal: str = "signal"


def train_encoder(spec: RunSpec, progress: Progress, *, force: bool = False) -> dict[str, Any]:
    """Train the encoder of a run, unless it is there, and write it where [model] looks for it; return what was done.

    After every epoch a checkpoint is written beside it, from which the same command goes on.

    Raises
    ------
    SpecError
        If the run's adapter is no text_encoder of one vector for each text, or an option is unknown or has no such value.
    NotReadyError
        If models of the signal are missing.
    ContractError
        If the signal is of other examples than the run's, or there is an encoder that was made otherwise.
    DataError
        If a text is longer than the encoder reads, or no outcomes differ.
    """
    base = _encoder(spec.untrained())
    place = place_of(_encoder(spec), force=force)
    options, settings = _options(spec)
    store = FeatureStore.open(options.store)
    signal = read_signal(store, options.signal)
    examples = base.examples().splits
    data = {name: store.open_set(name).info.data_hash for name in ("train", "learn")}
    ours = {name: data_hash(examples[name]) for name in data}
    remedy = "Give [data] as the run of that store has it, and its model in model.options.attributed."
    require_equal(f"{_KEY}.store: {options.store}", data, ours, remedy=remedy)
    made_from = plain(
        {
            "trainer": AIRREP,
            "options": asdict(settings),
            "base": hash_of_base(spec.training.base),
            "seed": spec.run.seed,
            "model": base.identity(),
            "signal": _hash_of(signal),
            "data": data,
        }
    )
    if (facts := kept(place, made_from, force=force)) is not None:
        return {"model": str(place), **facts, "kept": True}
    began = time.monotonic()
    lesson = _lesson(base, store, signal)
    model = cast("Representation", base.load(resolve_device(spec)))
    checkpoint = _Checkpoint(place, content_hash(made_from))
    trained, told = _fit(checkpoint, model, lesson, settings, (spec, progress))
    facts = {
        "examples": lesson.examples,
        "queries": len(lesson.outcomes),
        "subsets": len(lesson.subsets),
        "seconds": round(time.monotonic() - began, 3),
        **told,
    }
    write_model(base, trained, place, {"made_from": made_from, "facts": facts})
    checkpoint.remove()
    return {"model": str(place), **facts, "kept": False}


def _encoder(spec: RunSpec) -> TextEncoder:
    adapter = make_adapter(spec)
    if not isinstance(adapter, TextEncoder):
        raise SpecError(
            f"training.trainer: found {AIRREP!r} with model.adapter = {spec.model.adapter!r}; it trains a text_encoder."
        )
    found = spec.model.options
    if found.get("layers", "last") != "last" or found.get("normalize"):
        raise SpecError(
            "model.options: found layers or normalize; an encoder that airrep trains has one vector for each text, whose length matters: "
            "leave them out."
        )
    return adapter


def _options(spec: RunSpec) -> tuple[_Source, FittingSettings]:
    from gradstore.numerics.representation.fitting import FittingSettings

    own = {field.name for field in fields(_Source)}
    given = spec.training.options
    kinds = {AIRREP: FittingSettings}
    settings = resolve_kind(kinds, AIRREP, {key: value for key, value in given.items() if key not in own}, _KEY)
    where = resolve_kind({AIRREP: _Source}, AIRREP, {key: value for key, value in given.items() if key in own}, _KEY)
    return where, settings


def _lesson(adapter: TextEncoder, store: FeatureStore, signal: Signal) -> Lesson:
    """Texts of the train examples that are in subsets, and of the learn queries, with what became of these."""
    from gradstore.numerics.representation.fitting import Lesson

    rows, places = np.unique(signal.subsets, return_inverse=True)
    queries = np.flatnonzero(np.isfinite(signal.outcomes).all(0))
    if not len(queries):
        raise DataError(f"{store.storage.url}: no learn query has an outcome of every model.")
    found = [
        *examples_at(store.open_set("train"), rows.tolist()),
        *examples_at(store.open_set("learn"), queries.tolist()),
    ]
    return Lesson(
        texts=adapter.encode([example.text for example in found], adapter.context()),
        subsets=places.reshape(signal.subsets.shape),
        outcomes=signal.outcomes[:, queries].T.copy(),
    )


def _fit(
    checkpoint: _Checkpoint,
    model: Representation,
    lesson: Lesson,
    settings: FittingSettings,
    run: tuple[RunSpec, Progress],
) -> tuple[nn.Module, dict[str, Any]]:
    from gradstore.numerics.metrics import mean_interval
    from gradstore.numerics.representation.fitting import Fitting

    spec, progress = run
    fitting = Fitting(model, lesson, settings, seed=derive_key(spec.run.seed, "train", AIRREP) % 2**63)
    fitted = checkpoint.read() or fitting.begin()
    done = len(fitted.accuracies) - 1
    with progress.stage("train encoder", settings.epochs, "epochs", done) as advance:
        fitted = _to_the_end(fitting, fitted, checkpoint, advance)
        # An early end is an end.
        advance(settings.epochs - (len(fitted.accuracies) - 1))
    told = {
        "accuracy_before": fitted.accuracies[0],
        "accuracy": fitted.accuracies[fitted.best],
        "gain": mean_interval(fitted.gains(), seed=spec.run.seed)._asdict(),
        "epoch": fitted.best,
        "epochs": len(fitted.accuracies) - 1,
    }
    return fitting.best(fitted), told


def _to_the_end(fitting: Fitting, fitted: Fitted, checkpoint: _Checkpoint, advance: Any) -> Fitted:
    for reached in fitting.go_on(fitted):
        checkpoint.write(reached)
        advance(1)
    return fitted


class _Checkpoint:
    """A file beside the encoder with how far its training has come; of a training with other settings it says nothing."""

    def __init__(self, place: Path, made_from: str) -> None:
        self._file, self._made_from = place.with_name(place.name + _CHECKPOINT), made_from

    def read(self) -> Fitted | None:
        """What is there of this training."""
        from safetensors import SafetensorError, safe_open

        from gradstore.numerics.representation.fitting import Fitted

        if not self._file.exists():
            return None
        try:
            with safe_open(self._file, "pt") as opened:
                told: Mapping[str, str] = opened.metadata() or {}
                if told.get("made_from") != self._made_from:
                    return None
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        except SafetensorError as error:
            raise DataError(f"{self._file}: is damaged: {error}. Delete it; training then begins anew.") from error
        return Fitted(accuracies=json.loads(told["accuracies"]), best=int(told["best"]), tensors=tensors)

    def write(self, fitted: Fitted) -> None:
        """Put down how far it has come, in the place of what was there."""
        from safetensors.torch import save

        told = {
            "made_from": self._made_from,
            "accuracies": json.dumps(fitted.accuracies),
            "best": str(fitted.best),
        }
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._file) as temporary:
            temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in fitted.tensors.items()}, told))

    def remove(self) -> None:
        """Remove it, once the encoder is written."""
        self._file.unlink(missing_ok=True)


def _hash_of(signal: Signal) -> str:
    return content_hash(
        {"settings": signal.settings, "subsets": signal.subsets.tolist(), "outcomes": repr(signal.outcomes.tolist())}
    )
