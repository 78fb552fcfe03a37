"""Where models that were trained are kept, and what says what each was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gradstore.adapters import Adapter
from gradstore.adapters.training import Saved
from gradstore.errors import SpecError, StorageError
from gradstore.stages.output import replacing
from gradstore.store.contract import require_equal

_RECORD: Final = ".training.json"


def place_of(adapter: Adapter, *, force: bool) -> Path:
    """Return where [model] looks for the model of an adapter.

    Raises
    ------
    SpecError
        If it names no such place, or something is there that was not trained here, and ``force`` does not say that it may go.
    """
    if not isinstance(adapter, Saved):
        raise SpecError(f"model.adapter: {type(adapter).__name__} does not say how a model that was trained is kept.")
    place = adapter.saved_place()
    if place.exists() and not _record(place).exists() and not force:
        raise SpecError(
            f"{place}: is there, and `gradstore train` did not make it. Name another place in [model], or give --force."
        )
    return place


def kept(place: Path, made_from: Mapping[str, Any], *, force: bool) -> dict[str, Any] | None:
    """Return what is told of a model that is there; None where it is to be trained.

    Raises
    ------
    ContractError
        If it was made otherwise, and ``force`` does not say that it may go.
    """
    if force or not place.exists() or not _record(place).exists():
        return None
    remedy = "Restore these settings, name another place in [model], or give --force, which trains anew."
    stored = json.loads(_record(place).read_text(encoding="utf-8"))
    require_equal(f"The model {place}", stored["made_from"], made_from, remedy=remedy)
    facts: dict[str, Any] = stored["facts"]
    return facts


def write_model(adapter: Adapter, model: Any, place: Path, record: Mapping[str, Any]) -> None:
    """Write a model in the place of another, and the record last.

    Raises
    ------
    StorageError
        If it cannot be written.
    """
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
