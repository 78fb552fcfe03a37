"""Which kernel answers, with which settings: as the artifacts of the store have them, which later runs may have made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from gradstore.errors import SpecError
from gradstore.spec import RunSpec, parse_spec
from gradstore.stages.weights import learned_under, open_weights
from gradstore.store.artifacts import list_artifacts
from gradstore.store.features import FeatureStore

# What is made with a kernel and all that C depends on; the names of scores have those of weights behind a dot.
_MADE: Final = ("contributions", "moments", "score_matrix")
# Sections of the store's run that features and their products depend on.
_KEPT: Final = ("run", "model", "data", "features")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What C of a kernel depends on.

    Attributes
    ----------
    kernel
        Kind and options.
    kernel_of
        Whether members have a kernel each or one of their mean.
    normalize
        How C is normalised.
    etas
        Weight of every member.
    """

    kernel: Mapping[str, Any]
    kernel_of: str
    normalize: str
    etas: Mapping[str, float]


def known_kernels(store: FeatureStore) -> dict[str, Settings]:
    """Kernels, by name, under which the store has contributions or what is made in their place; else those of its run.

    Raises
    ------
    SpecError
        If there are none, and the run that made the store is none that this gradstore reads.
    """
    found: dict[str, Settings] = {}
    for artifact in list_artifacts(store.storage):
        keys = [field.name for field in fields(Settings)]
        if artifact.kind in _MADE and {*keys} <= {*artifact.settings}:
            made = {key: artifact.settings[key] for key in keys}
            found.setdefault(artifact.name.partition("/")[0].partition(".")[0], Settings(**made))
    if found:
        return found
    run = parse_spec(store.run, origin=f"{store.storage.url}/gradstore.json")
    return {
        swept.kernel.name: Settings(
            kernel={"kind": swept.kernel.kind, **swept.kernel.options},
            kernel_of=swept.kernel.members,
            normalize=swept.contribute.normalize,
            etas=swept.model.etas,
        )
        for swept in run.sweep()
    }


def choose_kernel(store: FeatureStore, name: str | None) -> tuple[str, Settings]:
    """Return the kernel of a name, or the only one.

    Raises
    ------
    SpecError
        If there is no such kernel, or one has to be chosen.
    """
    known = known_kernels(store)
    if name is None and len(known) == 1:
        return next(iter(known.items()))
    if name not in known:
        asked = "is missing" if name is None else f"found {name!r}"
        raise SpecError(f"--kernel: {asked}; {store.storage.url} has: {', '.join(sorted(known))}.")
    return name, known[name]


def query_spec(store: FeatureStore, kernel: tuple[str, Settings], *, model: str | None, device: str) -> RunSpec:
    """Return the run by which queries are answered from an opened store, by this process alone.

    Parameters
    ----------
    store
        The store.
    kernel
        Name and settings of the kernel.
    model
        Where the model is, if not where the store's run has it.
    device
        Where it computes: auto, cpu or cuda.

    Raises
    ------
    SpecError
        If the run that made the store is none that this gradstore reads, or its members have models of their own.
    """
    name, settings = kernel
    tables = {key: dict(store.run[key]) for key in _KEPT if key in store.run}
    tables["run"] = {**tables["run"], "store": store.storage.url}
    if members := tables.get("model", {}).get("members"):
        tables["model"]["members"] = [{**member, "eta": settings.etas[member["name"]]} for member in members]
    if model is not None:
        if others := [member["name"] for member in members or () if member["source"] is not None]:
            raise SpecError(
                f"--model: found {model}, but the members {', '.join(others)} of the store have models of their own."
            )
        # As run.toml has it: what is no path is a name that others resolve.
        tables["model"]["source"] = str(Path(model).absolute()) if Path(model).exists() else model
    options = {key: value for key, value in settings.kernel.items() if key != "kind"}
    tables["kernel"] = {
        "name": name,
        "kind": settings.kernel["kind"],
        "members": settings.kernel_of,
        "options": options,
    }
    tables["contribute"] = {"mode": "tensor", "normalize": settings.normalize, "second_moments": False}
    tables["cluster"] = {"workers": 1, "device": device}
    return parse_spec(tables, origin=f"{store.storage.url}/gradstore.json")


def weights_for(store: FeatureStore, kernel: str, names: list[str] | None) -> list[str]:
    """Return the names of weights to rank by: those asked for, or all that were learned under a kernel.

    Raises
    ------
    NotReadyError
        If one that is asked for is not there.
    """
    if names is None:
        return learned_under(store, kernel)
    for name in names:
        open_weights(store, name)
    return [*dict.fromkeys(names)]
