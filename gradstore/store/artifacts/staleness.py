"""Staleness: an artifact holds snapshots of the sets that it was made from, and these tell what has changed since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from gradstore.errors import ContractError, NotReadyError
from gradstore.store.features import FeatureStore

if TYPE_CHECKING:
    from gradstore.store.artifacts.artifact import ArtifactStatus

Generations = dict[int, int]


def snapshots_in(settings: Any) -> Iterator[tuple[str, Generations]]:
    """(set/member, generation of every block) of every snapshot among the settings of an artifact, however deep."""
    if isinstance(settings, Mapping):
        if {"feature_set", "member", "blocks"} <= set(settings):
            yield f"{settings['feature_set']}/{settings['member']}", {int(b): int(g) for b, g in settings["blocks"]}
        else:
            for value in settings.values():
                yield from snapshots_in(value)
    elif isinstance(settings, list | tuple):
        for value in settings:
            yield from snapshots_in(value)


def changed_blocks(made_from: Generations, now: Generations) -> list[int]:
    """Blocks that are in one snapshot only, or of another generation in the other."""
    return sorted(block for block in {*made_from, *now} if made_from.get(block) != now.get(block))


def stale_error(where: str, store_url: str, place: str, blocks: Sequence[int]) -> ContractError:
    """Return what tells of an artifact whose set has changed in some blocks since it was made."""
    shown = ", ".join(map(str, blocks[:5])) + (f" and {len(blocks) - 5} more" if len(blocks) > 5 else "")
    return ContractError(
        f"{where}: is stale: blocks {shown} of {place} were appended, erased or repaired since it was made. Run "
        f"`gradstore prune {store_url} --stale`, which removes what is stale, then the same command again."
    )


def stale_blocks(store: FeatureStore, artifacts: Iterable[ArtifactStatus]) -> dict[str, dict[str, list[int]]]:
    """By path of every stale artifact and by set/member, the blocks that it was not made from, or not as they are now.

    Blocks were appended, erased or repaired since. Every set is looked at once.
    """
    generations_now = cache(partial(_generations_now, store))
    found: dict[str, dict[str, list[int]]] = {}
    for artifact in artifacts:
        for place, made_from in snapshots_in(artifact.settings):
            if changed := changed_blocks(made_from, generations_now(place)):
                found.setdefault(artifact.path, {})[place] = changed
    return found


def _generations_now(store: FeatureStore, place: str) -> Generations:
    name, _, member = place.partition("/")
    try:
        opened = store.open_set(name, member)
    except NotReadyError:
        return {}
    units = opened.log.committed_units()
    return {block: generation for block, generation in units.items() if block < opened.info.num_blocks}
