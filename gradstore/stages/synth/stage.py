"""The stage: a folder with a run.toml of a synthetic run, and what is planted in it. featurize writes its features."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from gradstore.adapters.synthetic import Synthetic
from gradstore.errors import NotReadyError, SpecError
from gradstore.plan import make_plan
from gradstore.plan.resolve import make_adapter
from gradstore.spec import RunSpec, parse_spec, read_spec
from gradstore.stages.synth.settings import SynthSettings
from gradstore.store.codecs import plain
from gradstore.store.contract import require_equal
from gradstore.store.features import FeatureStore

RUN_FILE = "run.toml"
PLANTED_FILE = "planted.json"
_OTHER = "Ask for these settings to go on with it, or choose another FOLDER or --store."


def make_folder(settings: SynthSettings) -> RunSpec:
    """Write run.toml and planted.json into a folder, unless they are there, and return the run.

    Of a run.toml that is there the tables that say what the features are must be those that are asked for; it stays as it is.

    Raises
    ------
    SpecError, ResourceError
        If what is asked for cannot be planted, or does not fit.
    ContractError
        If the folder's run.toml, or the store, is of other settings. Nothing is written then.
    """
    # A Path has one slash of the two.
    if ":/" in settings.folder.as_posix():
        raise SpecError(
            f"FOLDER: found {settings.folder}; accepted: a folder on this machine. --store may be elsewhere."
        )
    folder = settings.folder.absolute()
    spec = parse_spec(tomllib.loads(settings.run_toml), origin="gradstore synth", folder=folder)
    _refuse_other_settings(spec, folder / RUN_FILE)
    adapter = make_adapter(spec)
    assert isinstance(adapter, Synthetic)
    told = json.dumps(_planted(adapter), indent=1) + "\n"
    make_plan(spec)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_first(folder / RUN_FILE, settings.run_toml)
        _write_first(folder / PLANTED_FILE, told)
    except OSError as error:
        raise SpecError(f"{error.filename}: cannot be written: {error.strerror}. Choose another FOLDER.") from error
    return spec


def _refuse_other_settings(spec: RunSpec, path: Path) -> None:
    """Refuse a folder or a store that holds something else than what is asked for."""
    asked = _identity(plain(spec.model_dump()))
    if path.exists():
        require_equal(str(path), _identity(plain(read_spec(path).model_dump())), asked, remedy=_OTHER)
    try:
        store = FeatureStore.open(spec.run.store)
    except NotReadyError:
        return
    require_equal(f"The store {store.storage.url}", _identity(store.run), asked, remedy=_OTHER)


def _identity(run: Any) -> dict[str, Any]:
    """Of a run the tables that say what its features are, and where."""
    return {"run": run["run"], "model": run["model"], "data": run["data"], "features": run["features"]}


def _planted(adapter: Synthetic) -> dict[str, Any]:
    """Names of the good and the noisy groups, and by set of queries the train rows that contribute to each."""
    planted = adapter.planted
    return {
        "good": [name for name, good in zip(adapter.names, planted.good, strict=True) if good],
        "noisy": [name for name, good in zip(adapter.names, planted.good, strict=True) if not good],
        "contributors": {name: rows_QC.tolist() for name, rows_QC in planted.contributors.items()},
    }


def _write_first(path: Path, text: str) -> None:
    """Write a file unless it is there."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return
