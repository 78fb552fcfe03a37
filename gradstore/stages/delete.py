"""delete: erase examples for good, by id or by what their columns say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from gradstore.errors import DataError, SpecError
from gradstore.stages.featurize.tables import statistics_of
from gradstore.stages.progress import Progress
from gradstore.store.artifacts import list_artifacts, stale_blocks
from gradstore.store.features import FeatureSet, FeatureStore, erase_rows, finish_erasure

COLUMNS: Final = ("example_id", "source", "label", "content_hash", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """Which examples: those whose id is among ``ids``, or that fulfil all conditions.

    Attributes
    ----------
    ids
        Example ids.
    conditions
        (column, pattern) pairs; in a pattern ``*`` stands for any text and ``?`` for any character.
    """

    ids: frozenset[str] = frozenset()
    conditions: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, ids: Sequence[str], conditions: Sequence[str]) -> Query:
        """Read what a command line gives.

        Raises
        ------
        SpecError
            If nothing is given, or a condition is not COLUMN=PATTERN with a column that exists.
        """
        if not ids and not conditions:
            raise SpecError("delete: found neither ids nor --where. Say which examples are to be erased.")
        pairs = []
        for condition in conditions:
            column, equals, pattern = condition.partition("=")
            if not equals or column not in COLUMNS:
                raise SpecError(f"--where: found {condition!r}; accepted: COLUMN=PATTERN with {', '.join(COLUMNS)}.")
            pairs.append((column, pattern))
        return cls(ids=frozenset(ids), conditions=tuple(pairs))

    def matches(self, example: Mapping[str, str | None]) -> bool:
        """Whether it is one of them; an example that is erased already never is."""
        if example["example_id"] is None:
            return False
        fulfilled = (fnmatchcase(example.get(column) or "", pattern) for column, pattern in self.conditions)
        return example["example_id"] in self.ids or (bool(self.conditions) and all(fulfilled))


def delete(store_url: str, query: Query, sets: Sequence[str], progress: Progress, *, dry_run: bool) -> dict[str, Any]:
    """Erase the examples that a query finds, in every member of every set, or of ``sets``; return what was done.

    Features, tables, inputs and the page of the report lose them. Kernels, contributions, weights and scores hold sums
    over them until they are made anew: they are told as stale.

    Raises
    ------
    DataError
        If an id is in none of the sets: nothing is erased then.
    """
    store = FeatureStore.open(store_url)
    chosen = {name: store.open_set(name) for name in (sets or store.set_names())}
    # What an erasure that died has left to do comes first: its examples have no ids any more.
    rewritten = {name: [] if dry_run else finish_erasure(each, statistics_of) for name, each in chosen.items()}
    found = {name: _find(feature_set, query) for name, feature_set in chosen.items()}
    strange = sorted(query.ids - {example for rows in found.values() for example in rows.values()})
    if strange and not any(rewritten.values()):
        shown = ", ".join(strange[:3]) + (f" and {len(strange) - 3} more" if len(strange) > 3 else "")
        raise DataError(
            f"{store.storage.url}: no example of {', '.join(chosen)} is called {shown}, or it is erased already. Nothing was "
            "erased; correct the ids."
        )
    if not dry_run:
        for name, rows in found.items():
            rewritten[name] = sorted({*rewritten[name], *_erase(store, name, rows, progress)})
        # It shows texts; `gradstore report` writes it anew.
        store.storage.delete("report.html")
    return {
        "store": store.storage.url,
        "dry_run": dry_run,
        "not_found": strange,
        "erased": {name: sorted(rows) for name, rows in found.items()},
        "rewritten": rewritten,
        "stale": stale_blocks(store, list_artifacts(store.storage)),
    }


def _find(feature_set: FeatureSet, query: Query) -> dict[int, str]:
    """Id of every example that a query finds, by row; looked for in the inputs, which blocks have before features."""
    found: dict[int, str] = {}
    for block in range(feature_set.info.num_blocks):
        start, _ = feature_set.info.block_range(block)
        table = feature_set.read_inputs(block)
        table = table.select([name for name in COLUMNS if name in table.column_names])
        found |= {
            start + n: example["example_id"] for n, example in enumerate(table.to_pylist()) if query.matches(example)
        }
    return found


def _erase(store: FeatureStore, name: str, rows: Mapping[int, str], progress: Progress) -> list[int]:
    if not rows:
        return []
    progress.note(f"features/{name}: erasing {len(rows):,} examples")
    return erase_rows(store, name, sorted(rows), statistics_of)
