"""transfer: weights that were learned on one store, for the same groups in another."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gradstore.errors import SpecError
from gradstore.spec.section import NAME
from gradstore.stages.weights import UNWEIGHTED, open_weights, refuse_strange_groups, weight_by_group
from gradstore.store.artifacts import WeightsArtifact
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    import pyarrow as pa


def transfer(source_url: str, name: str, store_url: str, new_name: str) -> dict[str, Any]:
    """Write to a store weights of another one; return where they came from and went to.

    Parameters
    ----------
    source_url, name
        The store that they were learned on, and their name there.
    store_url, new_name
        The store that gets them, and their name there.

    Raises
    ------
    SpecError
        If the name is none, or both are one store.
    NotReadyError
        If they have not been learned, or the store has no train set.
    ContractError
        If they are of other groups than the store's, or the name is taken.
    """
    if not re.fullmatch(NAME, new_name) or new_name == UNWEIGHTED:
        raise SpecError(
            f"--as: found {new_name!r}; accepted: letters, digits, - and _, the first of them a letter or digit, but not "
            f"{UNWEIGHTED}, which has another meaning."
        )
    source, store = FeatureStore.open(source_url), FeatureStore.open(store_url)
    if source.storage.url == store.storage.url:
        raise SpecError(f"{store.storage.url}: has {name} already. Name it where it is asked for: in score.weights.")
    learned = open_weights(source, name)
    weights, arrays = weight_by_group(learned), store.open_set("train").info.arrays
    where = f"{source.storage.url}/{learned.folder}"
    refuse_strange_groups(where, weights, [array.name for array in arrays])
    record = learned.log.require(0, f"{where}: not learned to the end.")
    made = {key: learned.settings[key] for key in ("learner", "kernel", "queries")}
    artifact = WeightsArtifact.create(
        store.storage,
        new_name,
        # Not the snapshots of the sets that they were learned from: those are another store's.
        settings={**made, "transferred_from": {"store": source.storage.url, "name": name, "attempt": record.attempt}},
    )
    artifact.write(
        _in_order_of([array.name for array in arrays], learned.read()), learned.read_trajectory(), facts=record.facts
    )
    return {"from": where, "to": f"{store.storage.url}/{artifact.folder}", "groups": len(arrays)}


def _in_order_of(groups: list[str], table: pa.Table) -> pa.Table:
    places = {group: place for place, group in enumerate(table["group"].to_pylist())}
    return table.take([places[group] for group in groups])
