"""prune: remove artifacts that are stale, or that are named; features stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradstore.errors import SpecError
from gradstore.store.artifacts import list_artifacts, remove_artifact, stale_blocks
from gradstore.store.features import FeatureStore


def prune(store_url: str, paths: Sequence[str], *, stale: bool, dry_run: bool) -> dict[str, Any]:
    """Remove artifacts; return them by path with their number of objects, 0 where it is only tried.

    Parameters
    ----------
    store_url
        The store.
    paths
        Paths of artifacts, as ``kernels/block/m0``, or of folders of them, as ``contributions/block``.
    stale
        Whether all that are stale go too.
    dry_run
        Whether nothing is removed.

    Raises
    ------
    SpecError
        If nothing is asked for, or a path is no artifact's.
    """
    if not paths and not stale:
        raise SpecError("prune: found no path and no --stale. Name artifacts of the store, or add --stale.")
    store = FeatureStore.open(store_url)
    artifacts = list_artifacts(store.storage)
    changed = stale_blocks(store, artifacts)
    chosen = set(changed) if stale else set()
    for path in paths:
        named = [artifact for artifact in artifacts if f"{artifact.path}/".startswith(f"{path.rstrip('/')}/")]
        if not named:
            known = ", ".join(artifact.path for artifact in artifacts) or "none"
            raise SpecError(f"{path}: is no artifact of {store.storage.url}; found: {known}.")
        chosen |= {artifact.path for artifact in named}
    return {
        "store": store.storage.url,
        "dry_run": dry_run,
        "removed": [
            {
                "path": path,
                "stale": changed.get(path, {}),
                "objects": 0 if dry_run else remove_artifact(store.storage, path),
            }
            for path in sorted(chosen)
        ],
    }
