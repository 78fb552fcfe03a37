"""A store as one listing and its documents describe it: sets, artifacts, and what each object is there for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gradstore.errors import IntegrityError, NotReadyError, ObjectMissingError
from gradstore.store.artifacts import ContributionArtifact, MomentsArtifact
from gradstore.store.artifacts.artifact import FOLDERS, VERBS, Artifact
from gradstore.store.backend import ObjectInfo, Storage
from gradstore.store.blocks import ObjectEntry, in_parallel
from gradstore.store.codecs import MALFORMED, decode_document
from gradstore.store.contract import require_version
from gradstore.store.features import FeatureSet, SetInfo, SetVersion
from gradstore.store.health.ledger import ARTIFACTS, Ledger, ledger_of_artifact, ledger_of_member
from gradstore.store.health.problems import Kind, Problem
from gradstore.store.jobs import forget, is_job_object, job_of
from gradstore.store.layout import (
    ARTIFACT_FILE,
    STORE_FILE,
    ArrayLayout,
    claim_path,
    metadata_objects,
    parse_record_path,
    record_path,
    set_folder,
    set_path,
)

_SET_DOCUMENT: Final = re.compile(r"features/[^/]+/(set|claim)\.(\d+)\.json")
_INPUTS: Final = re.compile(r"features/[^/]+/inputs/\d+\.(\d+)\.parquet")
_KINDS_OF_FOLDERS: Final = {top: kind for kind, (top, _) in FOLDERS.items()}
_RESTORE: Final = "Restore it from a copy; where there is none, choose another run.store."
# IntegrityError: of what the store itself has found so.
_MALFORMED: Final = (*MALFORMED, IntegrityError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What a store holds.

    Attributes
    ----------
    storage
        Where it is.
    listing
        Every object, by path.
    records
        Generations of every unit that has records, by the folder of the log.
    sets, artifacts
        Those whose documents can be read, by name and by folder.
    ledgers
        Of all these, in order.
    metadata
        By path, what a Zarr document is to say; where an append was begun, also what it makes of it.
    inputs
        By path, the tables of inputs that the newest version of a set names.
    old_inputs
        Tables of inputs that no version names which counts, or will.
    known
        Objects that are where the format has them: documents, records, metadata, inputs.
    problems
        What is wrong with documents.
    """

    storage: Storage
    listing: Mapping[str, ObjectInfo]
    records: Mapping[str, Mapping[int, list[int]]]
    sets: dict[str, FeatureSet] = field(default_factory=dict)
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    ledgers: list[Ledger] = field(default_factory=list)
    metadata: dict[str, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    inputs: dict[str, ObjectEntry] = field(default_factory=dict)
    old_inputs: list[ObjectInfo] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def add(self, kind: Kind, path: str, found: str, remedy: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(kind=kind, path=path, found=found, remedy=remedy))

    def generations(self, ledger: Ledger) -> Mapping[int, list[int]]:
        """Generations of every unit of a ledger that has records, ascending."""
        return self.records.get(ledger.log.folder, {})


def take_survey(storage: Storage) -> Survey:
    """List a store and read its documents.

    Raises
    ------
    NotReadyError
        If there is none.
    ContractError
        If a newer gradstore made it.
    """
    listing = {info.path: info for info in storage.list_objects("")}
    survey = Survey(storage=storage, listing=listing, records=_records_in(listing))
    sets, artifacts = _folders_in(listing)
    if STORE_FILE not in listing and not sets:
        raise NotReadyError(f"{storage.url}: no store is there ({STORE_FILE} is missing). Correct the URL.")
    _survey_store(survey)
    for name in sorted(sets):
        _survey_set(survey, name, sets[name])
    for folder in sorted(artifacts):
        _survey_artifact(survey, folder)
    _survey_jobs(survey)
    for ledger in survey.ledgers:
        for unit, generations in survey.generations(ledger).items():
            survey.known.update(record_path(ledger.log.folder, unit, generation) for generation in generations)
    survey.known.update(path for path in survey.metadata if path in listing)
    return survey


def _records_in(listing: Mapping[str, ObjectInfo]) -> dict[str, dict[int, list[int]]]:
    records: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for path in listing:
        named = parse_record_path(path) if path.endswith(".json") else None
        if named is not None:
            records[path.rpartition("/")[0]][named[0]].append(named[1])
    return {folder: {unit: sorted(units[unit]) for unit in sorted(units)} for folder, units in records.items()}


def _folders_in(listing: Mapping[str, ObjectInfo]) -> tuple[dict[str, list[str]], set[str]]:
    """Objects of every feature set that are no chunks, by name of the set; and the folders of artifacts."""
    sets: dict[str, list[str]] = defaultdict(list)
    artifacts = set()
    for path in listing:
        top, *names = path.split("/")
        if top == "features" and len(names) > 1:
            if _SET_DOCUMENT.fullmatch(path) or _INPUTS.fullmatch(path) or names[1] == "blocks":
                sets[names[0]].append(path)
        elif top in _KINDS_OF_FOLDERS:
            depth = FOLDERS[_KINDS_OF_FOLDERS[top]][1]
            if names[depth:] == [ARTIFACT_FILE] or names[depth : depth + 1] == ["commits"]:
                artifacts.add("/".join((top, *names[:depth])))
    return sets, artifacts


def _survey_store(survey: Survey) -> None:
    where = f"The store {survey.storage.url}"
    remedy = "Run `gradstore featurize` with the run.toml that the store was made with: it writes it anew."
    document = _read(survey, STORE_FILE, f"Restore it from a copy, or delete it. {remedy}")
    if document is not None:
        require_version(where, document)
    elif STORE_FILE not in survey.listing:
        survey.add("missing document", STORE_FILE, "is missing", remedy)


def _survey_set(survey: Survey, name: str, paths: list[str]) -> None:
    folder = set_folder(name)
    numbers: dict[str, set[int]] = {"set": set(), "claim": set()}
    for path in paths:
        if found := _SET_DOCUMENT.fullmatch(path):
            numbers[found[1]].add(int(found[2]))
    newest = -1
    while newest + 1 in numbers["set"]:
        newest += 1
    claimed = {number: _read_claim(survey, folder, number, newest) for number in sorted(numbers["claim"])}
    versions = [_read_version(survey, folder, number, newest) for number in sorted(numbers["set"])]
    lost = max(numbers["set"], default=-1) > newest
    if lost or not (numbers["set"] or numbers["claim"]):
        survey.add("missing document", set_path(folder, newest + 1), "is missing; the set cannot be read", _RESTORE)
        return
    if not all(versions) or _contradicts_a_claim(survey, filter(None, versions), claimed):
        return
    version, later = versions[-1] if versions else None, claimed.get(newest + 1)
    if later is not None:
        _tell_unfinished(survey, claim_path(folder, newest + 1), version, later)
    if version is None:
        return
    feature_set = FeatureSet(survey.storage, version, version.info.members[0])
    survey.sets[name] = feature_set
    survey.ledgers.extend(ledger_of_member(feature_set, member) for member in version.info.members)
    # An append that was begun may have enlarged the arrays.
    for info in filter(None, (version.info, later)):
        _expect_metadata(survey, dict(_arrays_of(info)))
    _survey_inputs(survey, version, set(claimed), paths)


def _contradicts_a_claim(survey: Survey, versions: Iterable[SetVersion], claimed: Mapping[int, SetInfo | None]) -> bool:
    """Whether a version of a set is not what was claimed: one of the two documents lies in another's place."""
    for version in versions:
        asked = claimed.get(version.number)
        if asked is not None and asked != version.info:
            path = set_path(version.info.folder, version.number)
            survey.add("damaged document", path, "is not what its claim says, or the claim is another's", _RESTORE)
            return True
    return False


def _arrays_of(info: SetInfo) -> Iterator[tuple[str, ArrayLayout]]:
    for member in info.members:
        for path, layout in info.layouts(member).items():
            yield f"{info.folder}/{path}", layout


def _survey_inputs(survey: Survey, version: SetVersion, claimed: set[int], paths: list[str]) -> None:
    folder = version.info.folder
    inputs = {f"{folder}/{path}": entry for path, entry in version.inputs.items()}
    survey.inputs.update(inputs)
    survey.known.update(path for path in inputs if path in survey.listing)
    for path in paths:
        found = _INPUTS.fullmatch(path)
        if found is None or path in inputs:
            continue
        number = int(found[1])
        if number > version.number and number in claimed:
            # Of a version that is being made; whoever goes on with it keeps what is there.
            survey.known.add(path)
            continue
        survey.old_inputs.append(survey.listing[path])
        if version.info.erased and number < version.number:
            remedy = "Run `gradstore featurize` or `gradstore gc`: both remove it."
            survey.add("unfinished erasure", path, "of an earlier version, is still there", remedy)


def _tell_unfinished(survey: Survey, path: str, version: SetVersion | None, claimed: SetInfo) -> None:
    if version is None:
        remedy = "Run `gradstore featurize` again: it goes on."
        survey.add("unfinished creation", path, "the creation of the set was begun and not finished", remedy)
    elif claimed.num_examples == version.info.num_examples:
        remedy = "Run the same `gradstore delete` again: it goes on."
        survey.add("unfinished erasure", path, "an erasure was begun and not finished", remedy)
    else:
        remedy = "Run `gradstore featurize --append` with the same data again: it goes on."
        survey.add("unfinished append", path, "an append was begun and not finished", remedy)


def _read_version(survey: Survey, folder: str, number: int, newest: int) -> SetVersion | None:
    path = set_path(folder, number)
    remedy = "Delete it, then run `gradstore featurize` again: it makes it anew and keeps the blocks."
    if number < newest:
        remedy = _RESTORE
    document = _read(survey, path, remedy)
    info = None if document is None else _info_in(survey, path, document, remedy)
    if document is None or info is None:
        return None
    try:
        inputs = {place: ObjectEntry(**entry) for place, entry in document["inputs"].items()}
    except _MALFORMED as error:
        survey.add("damaged document", path, f"is not of this version's shape: {error!r}", remedy)
        return None
    return SetVersion(number=number, info=info, inputs=inputs)


def _read_claim(survey: Survey, folder: str, number: int, newest: int) -> SetInfo | None:
    path = claim_path(folder, number)
    remedy = "Delete it" + (", then run the same command again: it makes it anew." if number > newest else ".")
    document = _read(survey, path, remedy)
    return None if document is None else _info_in(survey, path, document, remedy)


def _info_in(survey: Survey, path: str, document: Mapping[str, Any], remedy: str) -> SetInfo | None:
    """Return the set that a document describes, unless that is another than the one in whose folder it lies."""
    try:
        info = SetInfo.from_json(document["info"])
    except _MALFORMED as error:
        survey.add("damaged document", path, f"is not of this version's shape: {error!r}", remedy)
        return None
    if not path.startswith(f"{info.folder}/"):
        survey.add("damaged document", path, f"is of the set {info.name}", remedy)
        return None
    return info


def _survey_artifact(survey: Survey, folder: str) -> None:
    path, kind = f"{folder}/{ARTIFACT_FILE}", _KINDS_OF_FOLDERS[folder.partition("/")[0]]
    remedy = f"Delete the folder {folder}, then run `gradstore {VERBS[kind]}`: it makes it anew."
    if path not in survey.listing:
        survey.add("missing document", path, "is missing; the artifact cannot be read", remedy)
        return
    if _read(survey, path, remedy) is None:
        return
    try:
        artifact = ARTIFACTS[kind].find(survey.storage, folder)
        if artifact is None:
            return
        if artifact.info.kind != kind:
            survey.add("damaged document", path, f"is of an artifact of the kind {artifact.info.kind}", remedy)
            return
        # All of what is asked of it later.
        ledger = ledger_of_artifact(artifact)
        for unit in range(artifact.info.num_units):
            ledger.objects_of(unit)
        _expect_metadata(survey, {f"{folder}/{place}": layout for place, layout in artifact.arrays().items()})
        if isinstance(artifact, ContributionArtifact | MomentsArtifact):
            for place, payload in artifact.scale_chunks().items():
                survey.metadata[f"{folder}/{place}"].append(b"".join(payload.parts))
    except _MALFORMED as error:
        survey.add("damaged document", path, f"is not of this version's shape: {error!r}", remedy)
        return
    survey.artifacts[folder] = artifact
    survey.ledgers.append(ledger)


def _survey_jobs(survey: Survey) -> None:
    def read(path: str) -> None:
        _read(survey, path, forget(survey.storage.url, job_of(path)))

    # Drivers remove heartbeats; what is gone since it was listed is no problem.
    in_parallel(read, filter(is_job_object, survey.listing), threads=survey.storage.concurrency)


def _expect_metadata(survey: Survey, arrays: Mapping[str, ArrayLayout]) -> None:
    for path, data in metadata_objects(arrays).items():
        if data not in survey.metadata[path]:
            survey.metadata[path].append(data)


def _read(survey: Survey, path: str, remedy: str) -> dict[str, Any] | None:
    """Read a document that is listed, or None; one that is damaged is a problem."""
    where = f"{survey.storage.url}/{path}"
    if path not in survey.listing:
        return None
    survey.known.add(path)
    try:
        return decode_document(survey.storage.read(path), where, "")
    except ObjectMissingError:
        # Gone since it was listed.
        return None
    except IntegrityError as error:
        survey.add("damaged document", path, str(error).removeprefix(f"{where}: ").strip(), remedy)
        return None
