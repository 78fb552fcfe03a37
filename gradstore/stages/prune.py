"""prune: remove artifacts that are stale, or that are named; and what is known of jobs. Features stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradstore.errors import SpecError
from gradstore.stages.jobs.states import is_driven
from gradstore.store.artifacts import list_artifacts, remove_artifact, stale_blocks
from gradstore.store.backend import open_storage
from gradstore.store.features import FeatureStore
from gradstore.store.jobs import JOBS_FOLDER, Jobs

Stale = Mapping[str, Mapping[str, list[int]]]


def prune(store_url: str, paths: Sequence[str], *, stale: bool, dry_run: bool) -> dict[str, Any]:
    """Remove artifacts and jobs; return them by path with their number of objects, 0 where it is only tried.

    Parameters
    ----------
    store_url
        The store.
    paths
        Paths of artifacts, as ``kernels/block/m0``, or of folders of them, as ``contributions/block``; or of jobs that
        nobody drives, as ``jobs/<id>``.
    stale
        Whether all artifacts that are stale go too.
    dry_run
        Whether nothing is removed.

    Raises
    ------
    SpecError
        If nothing is asked for, a path is no artifact's nor a job's, or somebody drives that job.
    """
    if not paths and not stale:
        raise SpecError("prune: found no path and no --stale. Name artifacts of the store, or add --stale.")
    jobs = Jobs(open_storage(store_url, copies=False))
    named = {path.rstrip("/") for path in paths}
    chosen_jobs = sorted(_jobs_among(jobs, named))
    others = sorted(named - {f"{JOBS_FOLDER}/{job}" for job in chosen_jobs})
    # A store may have jobs before the first of them has made it one.
    chosen = _artifacts_among(FeatureStore.open(store_url), others, stale=stale) if others or stale else {}
    removed = [
        {"path": path, "stale": chosen[path], "objects": 0 if dry_run else remove_artifact(jobs.storage, path)}
        for path in sorted(chosen)
    ]
    removed += [
        {"path": f"{JOBS_FOLDER}/{job}", "stale": {}, "objects": 0 if dry_run else jobs.remove(job)}
        for job in chosen_jobs
    ]
    return {"store": jobs.storage.url, "dry_run": dry_run, "removed": removed}


def _jobs_among(jobs: Jobs, paths: set[str]) -> set[str]:
    """Jobs that paths name; refuses one that somebody drives, since its driver would go on."""
    asked = {path for path in paths if path.startswith(f"{JOBS_FOLDER}/")}
    found = {sight.id for sight in jobs.sights() if f"{JOBS_FOLDER}/{sight.id}" in asked} if asked else set()
    for job in sorted(found):
        if is_driven(jobs, job):
            raise SpecError(
                f"{JOBS_FOLDER}/{job}: somebody drives it. Cancel it first: gradstore jobs cancel {jobs.storage.url} {job}"
            )
    return found


def _artifacts_among(store: FeatureStore, paths: Sequence[str], *, stale: bool) -> Stale:
    """Artifacts that paths name or that are stale, each with what has changed of its sets."""
    artifacts = list_artifacts(store.storage)
    changed = stale_blocks(store, artifacts)
    chosen = set(changed) if stale else set()
    for path in paths:
        named = [artifact for artifact in artifacts if f"{artifact.path}/".startswith(f"{path}/")]
        if not named:
            known = ", ".join(artifact.path for artifact in artifacts) or "none"
            raise SpecError(f"{path}: is no artifact of {store.storage.url}; found: {known}.")
        chosen |= {artifact.path for artifact in named}
    return {path: changed.get(path, {}) for path in chosen}
