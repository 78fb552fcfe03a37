"""Sketches as stages find them: candidates for queries, and C of single rows, each verified by the checksum of the row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Final, Self

import numpy as np

from gradstore.errors import IntegrityError, SupersededError
from gradstore.plan.contribute import GROUPS_AT_ONCE
from gradstore.spec import RunSpec
from gradstore.stages.contribute.products import make_products
from gradstore.stages.contribute.queries import Slab, all_rows
from gradstore.stages.contribute.rows import query_factor, row_factor
from gradstore.stages.reading import full_rows
from gradstore.stages.spectra import kernel_settings, require_current
from gradstore.store.artifacts import SketchArtifact, SketchRows
from gradstore.store.artifacts.sketch import widened
from gradstore.store.checksums import extend_checksums
from gradstore.store.codecs import plain
from gradstore.store.features import FeatureSet, FeatureStore

# Bytes of features of single rows that are in memory at once.
_ROW_BYTES: Final = 2**28
# Most rows that are scored for the sake of opponents.
_OPPONENTS_SHARE: Final = 1 / 25
_DIGEST_DIGITS: Final = 16


def sketch_settings(spec: RunSpec, store: FeatureStore) -> dict[str, Any]:
    """What a sketch is made from: the kernel with its damping, what rows count by, and the train set as it is now."""
    made_from = None if spec.kernel.members == "mean" else store.open_set("train").info.members
    return {**_asked(spec), "train": store.describe("train", made_from)}


def open_for(store: FeatureStore, spec: RunSpec) -> SketchArtifact:
    """Open the sketch that a task is to write to.

    Raises
    ------
    SupersededError
        If it was made anew with other settings: a task of an earlier run may wait on a scheduler still.
    """
    artifact = SketchArtifact.open(store.storage, spec.kernel.name)
    if not _is_of(artifact, spec):
        raise SupersededError(
            f"{artifact.folder}: is of another kernel than this task's. Run `gradstore sketch` again."
        )
    return artifact


def _asked(spec: RunSpec) -> dict[str, Any]:
    return {
        "kernel": kernel_settings(spec),
        "kernel_of": spec.kernel.members,
        "etas": spec.model.etas,
        "normalize": spec.contribute.normalize,
    }


def _is_of(artifact: SketchArtifact, spec: RunSpec) -> bool:
    return all(artifact.settings[key] == value for key, value in plain(_asked(spec)).items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """How many rows of the best estimates on one side are scored exactly.

    Attributes
    ----------
    rows
        Rows of the largest estimates, or of the smallest.
    recall
        Mean share of the best rows that so many hold; None where it was not measured.
    """

    rows: int
    recall: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The rows of one weighting that are scored exactly; ``k`` best ones, no fewer than were asked for, recall was measured of."""

    k: int
    proponents: Side
    opponents: Side


@dataclass(frozen=True)
class Sketch:
    """A sketch in memory.

    Attributes
    ----------
    store, spec
        The store that queries are in, and the run whose kernel it is of.
    artifact
        Where it is.
    """

    store: FeatureStore
    spec: RunSpec
    artifact: SketchArtifact

    @classmethod
    def find(cls, store: FeatureStore, spec: RunSpec) -> Self | None:
        """Open the sketch of a run's kernel; None if there is none that is whole and of these settings.

        Raises
        ------
        ContractError
            If it is stale: the train set has changed since.
        """
        artifact = SketchArtifact.find_named(store.storage, spec.kernel.name)
        if artifact is None or not _is_of(artifact, spec) or not artifact.is_complete():
            return None
        require_current(artifact, store)
        return cls(store=store, spec=spec, artifact=artifact)

    def is_same(self, other: Sketch) -> bool:
        """Whether another is this one, not made anew since."""
        return self._attempt == other._attempt

    @cached_property
    def _attempt(self) -> str:
        last = self.artifact.recall_unit
        return self.artifact.log.require(last, f"{self.artifact.folder}: is not whole.").attempt

    @cached_property
    def rows(self) -> SketchRows:
        """What is kept of every row."""
        return self.artifact.read_rows()

    @cached_property
    def recall(self) -> Mapping[str, Any]:
        """What recall was measured."""
        return self.artifact.read_recall()

    @cached_property
    def _basis(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        return self.artifact.read_basis()

    def estimates(self, slab: Slab, weights_VM: np.ndarray) -> np.ndarray:
        """Estimates of the scores of all rows, float32 [V, Q, N], of the queries of a slab under some weightings.

        NaN where a row is not valid.
        """
        from gradstore.numerics.kernel import zero_invalid
        from gradstore.numerics.sketch import estimated_scores

        set_name, asked = slab.target.set_name, slice(slab.first, slab.last)
        total_VQR: np.ndarray | None = None
        for member, of_member in self._basis.items():
            queries = self.store.open_set(set_name, member)
            for place, array in enumerate(queries.info.arrays):
                psi_Qk = all_rows(queries, array)[asked]
                zero_invalid(psi_Qk)
                part_QR = full_rows(array, psi_Qk) @ widened(of_member[array.name])
                if total_VQR is None:
                    total_VQR = np.zeros((len(weights_VM), *part_QR.shape), np.float32)
                total_VQR += weights_VM[:, place, None, None].astype(np.float32) * part_QR
        assert total_VQR is not None, "a sketch has a member, and that a group"
        factor_Q = query_factor(self.store, self.spec, set_name)
        if factor_Q is not None:
            total_VQR *= factor_Q[asked, None]
        flat = estimated_scores(self.rows.levels, self.rows.scales, total_VQR.reshape(-1, total_VQR.shape[2]))
        return flat.reshape(*total_VQR.shape[:2], -1)

    def candidates_for(self, k: int, weightings: Mapping[str, np.ndarray]) -> dict[str, Candidates] | None:
        """How many candidates hold the best k rows as surely as was asked for, by weighting; None if no number does.

        Opponents are asked for less often, and under weights they may stand out so little that it would take most rows: they
        have as many candidates as they need up to a share of the rows, and their recall is told. Of weights that recall
        was not measured under, since they are new or others by now, candidates are as many as of those that take most.
        """
        measured = min((int(rows) for rows in self.recall["rows"] if rows >= k), default=None)
        if measured is None:
            return None
        known, weights = self.recall["recall"], self.recall["weights"]
        same = [name for name, weights_M in weightings.items() if weights.get(name) == digest_of(weights_M)]
        wanted = same if len(same) == len(weightings) else [*known]
        found: dict[str, Candidates] = {}
        for name in wanted:
            proponents = self._enough(k, known[name]["proponents"][str(measured)])
            if proponents is None:
                return None
            opponents = self._affordable(k, known[name]["opponents"][str(measured)])
            found[name] = Candidates(k=measured, proponents=proponents, opponents=opponents)
        most = Candidates(
            k=measured,
            proponents=Side(rows=max(each.proponents.rows for each in found.values()), recall=None),
            opponents=Side(rows=max(each.opponents.rows for each in found.values()), recall=None),
        )
        return {name: found[name] if name in same else most for name in weightings}

    def _enough(self, k: int, recalls: Sequence[float]) -> Side | None:
        """The least number of candidates, among those that were tried, that is to be taken; None if there is none."""
        wanted = self.recall["wanted"]
        for count, recall in zip(self.recall["candidates"], recalls, strict=True):
            is_enough = recall >= wanted["recall"] if wanted["candidates"] == "auto" else count >= wanted["candidates"]
            if count >= k and is_enough:
                return Side(rows=count, recall=recall)
        return None

    def _affordable(self, k: int, recalls: Sequence[float]) -> Side:
        """The same, or where that is more than a share of the rows, the most below it."""
        enough, most = self._enough(k, recalls), int(_OPPONENTS_SHARE * self.artifact.shape.num_examples)
        if enough is not None and (enough.rows <= most or self.recall["wanted"]["candidates"] != "auto"):
            return enough
        tried = [
            Side(rows=count, recall=recall)
            for count, recall in zip(self.recall["candidates"], recalls, strict=True)
            if count >= k
        ]
        return max((side for side in tried if side.rows <= most), key=lambda side: side.rows, default=tried[0])

    def contributions(self, slab: Slab, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (some of the rows, C [Q, n, M] of them), exactly: of the rows, in ascending order, read one by one.

        Raises
        ------
        IntegrityError
            If the features of a row are not those that were sketched.
        """
        info = self.store.open_set("train").info
        a_row = 4 * sum(array.features for array in info.arrays)
        step = max(1, _ROW_BYTES // a_row)
        products = {
            member: make_products(self.store, self.spec, member, [[slab]])[0] for member in self.artifact.shape.members
        }
        groups = [array.name for array in info.arrays]
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            c_QNM = np.zeros((slab.queries, len(some), len(groups)), np.float32)
            for member, product in products.items():
                train = self.store.open_set("train", member)
                features, factor_N = self._read(train, some)
                for start in range(0, len(groups), GROUPS_AT_ONCE):
                    batch = groups[start : start + GROUPS_AT_ONCE]
                    out_NGQ = np.empty((len(some), len(batch), slab.queries), np.float32)
                    product.write({group: features[group] for group in batch}, out_NGQ)
                    out_NGQ *= factor_N[:, None, None]
                    c_QNM[:, :, start : start + len(batch)] += out_NGQ.transpose(2, 0, 1)
            yield some, c_QNM

    def _read(self, train: FeatureSet, rows: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Verified features of some rows of a member, by group, and what they count."""
        info = train.info
        features = {array.name: np.empty((len(rows), array.features), np.float32) for array in info.arrays}
        factor_N = np.empty(len(rows), np.float32)
        blocks = rows // info.block_rows
        for block in np.unique(blocks).tolist():
            places = slice(*np.searchsorted(blocks, (block, block + 1)).tolist())
            within = rows[places] % info.block_rows
            out = {group: values[places] for group, values in features.items()}
            if not self._read_sketched(train, rows[places], out):
                # Perhaps damaged on their way, or a chunk is: the checksum of the whole tells, and what to do.
                for group, values in out.items():
                    values[:] = train.read_block(block, [group])[group][within]
                if not self._are_sketched(train.member, rows[places], out):
                    url = self.store.storage.url
                    raise IntegrityError(
                        f"{url}/{self.artifact.folder}: features of block {block} are not those that were sketched. Run "
                        f"`gradstore prune {url} {self.artifact.folder}`, then `gradstore sketch`: it makes it anew."
                    )
            factor_N[places] = row_factor(self.store, self.spec, train, block)[within]
        return features, factor_N

    def _read_sketched(self, train: FeatureSet, rows: np.ndarray, out: Mapping[str, np.ndarray]) -> bool:
        """Read some rows of one block; return whether they are those that were sketched."""
        block = int(rows[0]) // train.info.block_rows
        try:
            train.read_rows(block, (rows % train.info.block_rows).tolist(), out)
        except IntegrityError:
            return False
        return self._are_sketched(train.member, rows, out)

    def _are_sketched(self, member: str, rows: np.ndarray, features: Mapping[str, np.ndarray]) -> bool:
        found = np.zeros(len(rows), np.uint32)
        extend_checksums(found, [*features.values()])
        expected = self.rows.checksums[rows, self.artifact.shape.members.index(member)]
        return bool((found == expected).all())


def digest_of(weights_M: np.ndarray) -> str:
    """What tells weights from others of the same name."""
    return sha256(np.ascontiguousarray(weights_M, "<f8").tobytes()).hexdigest()[:_DIGEST_DIGITS]


def best_rows(
    sketch: Sketch, slab: Slab, weightings: Mapping[str, np.ndarray], counts: Mapping[str, Candidates]
) -> np.ndarray:
    """Rows, ascending, that are among the candidates of some query of a slab under some weighting."""
    from gradstore.numerics.sketch import candidates

    estimates = sketch.estimates(slab, np.stack([*weightings.values()]))
    found = [
        candidates(of_weights, counts[name].proponents.rows, counts[name].opponents.rows)
        for name, of_weights in zip(weightings, estimates, strict=True)
    ]
    return np.unique(np.concatenate(found))
