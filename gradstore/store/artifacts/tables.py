"""Artifacts that are tables: learned weights, scores, what they were measured to be worth, and what that is measured by."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import pyarrow as pa

from gradstore.store.artifacts.artifact import Artifact, ArtifactInfo
from gradstore.store.backend import Storage
from gradstore.store.codecs import decode_document, decode_table, encode_document, encode_table
from gradstore.store.commits import Record
from gradstore.store.layout import ArrayLayout

_WEIGHTS = "weights.parquet"
_TRAJECTORY = "trajectory.parquet"
_CANDIDATES = "candidates.parquet"
_PROPONENTS = "proponents.parquet"
_SUMMARY = "summary.json"
_VALUES = "values.parquet"
_OUTPUTS = "outputs.parquet"
_CHANGES = "changes.parquet"


class _TablesArtifact(Artifact):
    """An artifact of one unit, without arrays."""

    @property
    @abstractmethod
    def objects(self) -> tuple[str, ...]:
        """The objects of the unit."""

    def arrays(self) -> dict[str, ArrayLayout]:
        """See `Artifact.arrays`; it has none."""
        return {}

    def unit_objects(self, unit: int) -> dict[str, ArrayLayout | None]:
        """See `Artifact.unit_objects`."""
        return dict.fromkeys(self.objects)

    @classmethod
    def create(cls, storage: Storage, *names: str, settings: Mapping[str, Any]) -> Self:
        """Create the artifact of these names, or open the one that is there if its settings are equal.

        Raises
        ------
        ContractError
            If it is there with other settings.
        """
        return cls._create(storage, names, ArtifactInfo(kind=cls.kind, num_units=1, settings=settings))

    @classmethod
    def open(cls, storage: Storage, *names: str) -> Self:
        """Open the artifact; NotReadyError if there is none of these names."""
        return cls._open(storage, names)


class WeightsArtifact(_TablesArtifact):
    """Learned weights w[j] and how they were reached, at ``weights/<name>``; one unit is the whole.

    Where queries were held out, by which candidates are judged, there is a table of these.
    """

    kind: ClassVar[str] = "weights"

    @property
    def objects(self) -> tuple[str, ...]:
        """The objects of the unit."""
        return (_WEIGHTS, _TRAJECTORY, *([_CANDIDATES] if self.has_candidates else []))

    @property
    def has_candidates(self) -> bool:
        """Whether there is a table of candidates; it stays behind when weights go to another store."""
        return "transferred_from" not in self.settings and bool(self.settings.get("learner", {}).get("held_out"))

    def write(
        self,
        weights: pa.Table,
        trajectory: pa.Table,
        candidates: pa.Table | None = None,
        *,
        facts: Mapping[str, Any],
    ) -> Record:
        """Write and commit the artifact.

        Parameters
        ----------
        weights
            One row for each group, in their order: group, depth, function, weight.
        trajectory
            One row for each step: step, epoch, query, loss, and weights, which are null but where an epoch ends. None of
            solvers that take no steps query by query.
        candidates
            One row for each candidate: k, weight_decay, seed, gain, chosen, weights; where queries were held out.
        facts
            What to keep in the record: seconds, versions.
        """
        payloads = {_WEIGHTS: encode_table(weights), _TRAJECTORY: encode_table(trajectory)}
        if candidates is not None:
            payloads[_CANDIDATES] = encode_table(candidates)
        return self._committed(0) or self._write_unit(0, payloads, facts)

    def read(self) -> pa.Table:
        """Return the weights; NotReadyError if they are not committed."""
        return decode_table(self._read_object(_WEIGHTS))

    def read_trajectory(self) -> pa.Table:
        """Return the trajectory; NotReadyError if it is not committed."""
        return decode_table(self._read_object(_TRAJECTORY))

    def read_candidates(self) -> pa.Table | None:
        """Return the candidates, None where there was nothing to choose; NotReadyError if they are not committed."""
        return decode_table(self._read_object(_CANDIDATES)) if self.has_candidates else None


class ScoresArtifact(_TablesArtifact):
    """Proponents and opponents of every query, and what they amount to, at ``scores/<name>``; one unit is the whole."""

    kind: ClassVar[str] = "scores"

    @property
    def objects(self) -> tuple[str, ...]:
        """The objects of the unit."""
        return (_PROPONENTS, _SUMMARY)

    def write(self, proponents: pa.Table, summary: Mapping[str, Any], *, facts: Mapping[str, Any]) -> Record:
        """Write and commit the artifact.

        Parameters
        ----------
        proponents
            One row for each query and place: query, rank, side (``proponent`` or ``opponent``), example, score, parts.
        summary
            Plain values: kernel, weights, precision_at_10, chance, baselines, tail patch.
        facts
            What to keep in the record: seconds, versions.
        """
        payloads = {_PROPONENTS: encode_table(proponents), _SUMMARY: encode_document(summary)}
        return self._committed(0) or self._write_unit(0, payloads, facts)

    def read(self) -> pa.Table:
        """Return proponents and opponents; NotReadyError if they are not committed."""
        return decode_table(self._read_object(_PROPONENTS))

    def read_summary(self) -> dict[str, Any]:
        """Return the summary; NotReadyError if it is not committed."""
        where, remedy = f"{self.storage.url}/{self.folder}/{_SUMMARY}", self.log.remedy()
        return decode_document(self._read_object(_SUMMARY), where, remedy)


class EvaluationArtifact(_TablesArtifact):
    """What one method is worth by one measure, at ``evaluations/<measure>/<method>``; one unit is the whole.

    Means, intervals and differences are made of its values whenever they are told.
    """

    kind: ClassVar[str] = "evaluation"

    @property
    def objects(self) -> tuple[str, ...]:
        """The objects of the unit."""
        return (_VALUES,)

    def write(self, values: pa.Table, *, facts: Mapping[str, Any]) -> Record:
        """Write and commit the values: one row for each query that was measured, by its row in the set."""
        return self._committed(0) or self._write_unit(0, {_VALUES: encode_table(values)}, facts)

    def read(self) -> pa.Table:
        """Return the values; NotReadyError if they are not committed."""
        return decode_table(self._read_object(_VALUES))


class RetrainedArtifact(_TablesArtifact):
    """What one model outputs that was trained on a subset of the train set, at ``retrained/<name>/<subset>.<seed>``.

    Each is an artifact of its own, so that there may be more of them later.
    """

    kind: ClassVar[str] = "retrained"

    @property
    def objects(self) -> tuple[str, ...]:
        """The objects of the unit."""
        return (_OUTPUTS,)

    def write(self, outputs: pa.Table, *, facts: Mapping[str, Any]) -> Record:
        """Write and commit the outputs: one row for each query, with its set, its row in that, and f."""
        return self._committed(0) or self._write_unit(0, {_OUTPUTS: encode_table(outputs)}, facts)

    def read(self) -> pa.Table:
        """Return the outputs; NotReadyError if they are not committed."""
        return decode_table(self._read_object(_OUTPUTS))


class PatchedArtifact(_TablesArtifact):
    """What a step on a query's proponents does to it, at ``patched/<query>.<hash>`` of its settings; one unit is the whole."""

    kind: ClassVar[str] = "patched"

    @property
    def objects(self) -> tuple[str, ...]:
        """The objects of the unit."""
        return (_CHANGES,)

    def write(self, changes: pa.Table, *, facts: Mapping[str, Any]) -> Record:
        """Write and commit the changes: one row for each ranking, with its method and the percent."""
        return self._committed(0) or self._write_unit(0, {_CHANGES: encode_table(changes)}, facts)

    def read(self) -> pa.Table:
        """Return the changes; NotReadyError if they are not committed."""
        return decode_table(self._read_object(_CHANGES))
