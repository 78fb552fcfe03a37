"""Work on a store that is only read: what is made for one measure is made over it, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

from gradstore.spec import RunSpec
from gradstore.store.backend.overlay import OverlayStorage, overlay_url
from gradstore.store.features import FeatureStore


@contextmanager
def over_store(spec: RunSpec) -> Iterator[tuple[RunSpec, FeatureStore]]:
    """Enter with a run of a store that lies over its own, and that store; what was written there is forgotten in the end."""
    url = overlay_url(uuid4().hex, spec.run.store)
    store = FeatureStore.open(url)
    assert isinstance(store.storage, OverlayStorage), "it lies over another"
    try:
        yield spec.model_copy(update={"run": spec.run.model_copy(update={"store": url})}), store
    finally:
        store.storage.drop("")
