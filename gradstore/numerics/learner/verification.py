"""One read of C that verifies the top k of every visit of all settings, and finds the rows that they lack."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from gradstore.numerics.learner.algorithm import placing_scores, refuse_non_finite
from gradstore.numerics.learner.kept import SLICE_BYTES, KeptRows, exact_scores, top_rows
from gradstore.numerics.learner.screen import Screen
from gradstore.numerics.learner.trajectory import TIE, Trajectory

# Q queries, N rows of a piece or slice, M groups, V open visits of one query over all settings, E of them of one setting,
# T visits of a setting, F rows found, X rows kept and found.

# Found rows are thinned out once there are so many since the last time, and half as many as are held.
ROWS_BEFORE_THINNING = 64


class Verification:
    """The state of one read.

    Attributes
    ----------
    rows_Q
        Rows seen of every query.
    full
        Whether the rows found passed the limit. They are then dropped, and visits are only judged.

    Parameters
    ----------
    trajectories
        The settings whose open visits are verified.
    second_moments_QMM
        A_q.
    kept
        The rows that the settings ran on.
    limit_bytes
        Most bytes of kept rows together with found ones.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        second_moments_QMM: Float64[np.ndarray, "Q M M"],
        *,
        kept: KeptRows,
        limit_bytes: int,
    ) -> None:
        group_norms_QM = np.sqrt(np.maximum(0, second_moments_QMM.diagonal(axis1=1, axis2=2)))
        self._queries = [
            QueryVerification(query, trajectories, kept=kept, group_norms_M=group_norms_M)
            for query, group_norms_M in enumerate(group_norms_QM)
        ]
        self._trajectories = trajectories
        self._kept = kept
        self._room = limit_bytes - kept.num_bytes
        self._found_bytes = 0
        self.rows_Q = np.zeros(len(kept), np.int64)
        self.full = False

    def offer(self, first: int, rows_N: Int64[np.ndarray, " N"], c_QNM: Float32[np.ndarray, "Q N M"]) -> None:
        """Take in a piece of C: some rows of the queries from ``first`` on.

        Raises
        ------
        DataError
            If C holds NaN or infinite values.
        """
        for query, c_NM in enumerate(c_QNM, first):
            verified = self._queries[query]
            before = verified.found_bytes
            verified.offer(rows_N, c_NM)
            self._found_bytes += verified.found_bytes - before
            self.rows_Q[query] += len(rows_N)
            if self._found_bytes > self._room and not self.full:
                self._make_room()

    def _make_room(self) -> None:
        for verified in self._queries:
            verified.thin()
        self._found_bytes = sum(verified.found_bytes for verified in self._queries)
        if self._found_bytes > self._room:
            self.full, self._found_bytes = True, 0
            for verified in self._queries:
                verified.stop_finding()

    def finish(self) -> int:
        """Settle the visits of every setting up to the first that failed, keep the rows found, and return their number."""
        failed = [np.zeros(len(trajectory.visits), bool) for trajectory in self._trajectories]
        added = 0
        for query, verified in enumerate(self._queries):
            verified.thin()
            verified.report(failed)
            self._kept.add(query, verified.found_rows_F, verified.found_c_FM)
            added += len(verified.found_rows_F)
        for trajectory, failed_T in zip(self._trajectories, failed, strict=True):
            failures = np.flatnonzero(failed_T)
            trajectory.settled = int(failures[0]) if len(failures) else len(failed_T)
        return added


class QueryVerification:
    """One query's part of a read.

    A row that is not kept fails a visit if its placing score is above the k-th there by more than ties may be. Such rows are
    collected, and thinned out to those of a top k of the rows kept and found: the k-th score among these, which only grows,
    is what later rows must exceed.

    Parameters
    ----------
    query
        Its number.
    trajectories
        The settings whose open visits are verified.
    kept
        The rows that the settings ran on.
    group_norms_M
        ||C_q[:, j]||.
    """

    def __init__(
        self,
        query: int,
        trajectories: Sequence[Trajectory],
        *,
        kept: KeptRows,
        group_norms_M: Float64[np.ndarray, " M"],
    ) -> None:
        self._query = query
        self._kept = kept
        self._visits = [(trajectory, trajectory.open_visits(query)) for trajectory in trajectories]
        self._floor_V = np.concatenate([trajectory.kth_T[visits_E] for trajectory, visits_E in self._visits])
        self._slack_V = np.concatenate([trajectory.slack_T[visits_E] for trajectory, visits_E in self._visits])
        self._square_V = np.concatenate(
            [np.full(len(visits_E), trajectory.settings.transform == "square") for trajectory, visits_E in self._visits]
        )
        norms_V = np.concatenate([trajectory.norms_T[visits_E] for trajectory, visits_E in self._visits])
        self._failed_V = np.zeros(len(self._floor_V), bool)
        self._tied_V = np.zeros(len(self._floor_V), bool)
        self._screen = Screen(self._weights(), norms_V=norms_V, group_norms_M=group_norms_M, square_V=self._square_V)
        self._screen.require(self._floor_V - self._slack_V)
        self._finding = True
        self._unthinned = 0
        self.found_rows_F = np.empty(0, np.int64)
        self.found_c_FM = np.empty((0, len(group_norms_M)), np.float32)

    @property
    def found_bytes(self) -> int:
        """Bytes of the rows found."""
        return self.found_rows_F.nbytes + self.found_c_FM.nbytes

    def _weights(self) -> Float64[np.ndarray, "V M"]:
        # Made anew where it is needed: every query's at once would be as much as the trajectories.
        return np.concatenate([trajectory.weights_TM[visits_E] for trajectory, visits_E in self._visits])

    def offer(self, rows_N: Int64[np.ndarray, " N"], c_NM: Float32[np.ndarray, "N M"]) -> None:
        """Take in some rows; see `Verification.offer`."""
        if not len(self._floor_V):
            return
        width = max(1, c_NM.shape[1], len(self._floor_V))
        rows = max(1, SLICE_BYTES // (4 * width))
        for start in range(0, len(c_NM), rows):
            self._offer_slice(rows_N[start : start + rows], c_NM[start : start + rows])

    def _offer_slice(self, rows_N: Int64[np.ndarray, " N"], c_NM: Float32[np.ndarray, "N M"]) -> None:
        score_NV = self._screen.scores(c_NM)
        if not self._screen.is_finite():
            refuse_non_finite(c_NM, self._query, rows_N)
        near_H = self._screen.near(score_NV)
        near_H = near_H[~self._kept.holds(self._query, rows_N[near_H])]
        if not len(near_H):
            return
        near_H = near_H[self._screen.nearer(score_NV[near_H], c_NM[near_H])]
        above_H = self._judge(c_NM[near_H])
        if self._finding and above_H.any():
            self._collect(rows_N[near_H[above_H]], c_NM[near_H[above_H]])

    def _judge(self, c_HM: Float32[np.ndarray, "H M"]) -> Bool[np.ndarray, " H"]:
        """Which rows belong in the top k of some visit, by float64; fails such visits, and notes ties at others."""
        weights_VM = self._weights()
        placing_HV = exact_scores(c_HM, weights_VM)
        np.abs(placing_HV, out=placing_HV, where=self._square_V)
        slack_HV = np.maximum(TIE * exact_scores(np.abs(c_HM), weights_VM), self._slack_V)
        above_HV = placing_HV > self._floor_V + slack_HV
        self._failed_V |= above_HV.any(0)
        self._tied_V |= (~above_HV & (placing_HV >= self._floor_V - slack_HV)).any(0)
        return np.asarray(above_HV.any(1))

    def _collect(self, rows_F: Int64[np.ndarray, " F"], c_FM: Float32[np.ndarray, "F M"]) -> None:
        self.found_rows_F = np.concatenate([self.found_rows_F, rows_F])
        self.found_c_FM = np.concatenate([self.found_c_FM, c_FM])
        self._unthinned += len(rows_F)
        held = len(self._kept.rows(self._query)) + len(self.found_rows_F)
        if self._unthinned >= max(ROWS_BEFORE_THINNING, held // 2):
            self.thin()

    def thin(self) -> None:
        """Drop the rows found that are in no top k of the rows kept and found, and raise the scores to be exceeded."""
        if not self._unthinned:
            return
        rows_X = np.concatenate([self._kept.rows(self._query), self.found_rows_F])
        order_X = np.argsort(rows_X, kind="stable")
        c_XM = np.concatenate([self._kept.c(self._query), self.found_c_FM])[order_X]
        needed_X, place = np.zeros(len(rows_X), bool), 0
        columns = max(1, SLICE_BYTES // (8 * len(rows_X)))
        for trajectory, visits_E in self._visits:
            for start in range(0, len(visits_E), columns):
                part_E = visits_E[start : start + columns]
                floor_E, slack_E, top_XE = _top_of(trajectory, part_E, c_XM)
                self._floor_V[place : place + len(part_E)] = floor_E
                self._slack_V[place : place + len(part_E)] = slack_E
                needed_X[order_X] |= top_XE.any(1)
                place += len(part_E)
        self._screen.require(self._floor_V - self._slack_V)
        needed_F = needed_X[len(self._kept.rows(self._query)) :]
        self.found_rows_F, self.found_c_FM = self.found_rows_F[needed_F], self.found_c_FM[needed_F]
        self._unthinned = 0

    def stop_finding(self) -> None:
        """Drop the rows found, and collect no more."""
        self._finding = False
        self.found_rows_F, self.found_c_FM = self.found_rows_F[:0], self.found_c_FM[:0].copy()
        self._unthinned = 0

    def report(self, failed: Sequence[Bool[np.ndarray, " _"]]) -> None:
        """Note which visits failed or have ties, and how far the norms by A_q are from those of the scores read."""
        error_V = self._screen.norm_errors()
        place = 0
        for (trajectory, visits_E), failed_T in zip(self._visits, failed, strict=True):
            part = slice(place, place + len(visits_E))
            failed_T[visits_E] = self._failed_V[part]
            trajectory.tied_T[visits_E] |= self._tied_V[part]
            trajectory.norm_errors_T[visits_E] = error_V[part]
            place += len(visits_E)


def _top_of(
    trajectory: Trajectory, visits_E: Int64[np.ndarray, " E"], c_XM: Float32[np.ndarray, "X M"]
) -> tuple[Float64[np.ndarray, " E"], Float64[np.ndarray, " E"], Bool[np.ndarray, "X E"]]:
    """At some visits of one query, the placing score at the k-th place of some rows, its slack, and the top k."""
    settings, weights_EM = trajectory.settings, trajectory.weights_TM[visits_E]
    if trajectory.positives is not None:
        return np.full(len(visits_E), np.inf), np.zeros(len(visits_E)), np.zeros((len(c_XM), len(visits_E)), bool)
    placing_XE = placing_scores(exact_scores(c_XM, weights_EM), settings.transform)
    top_XE = top_rows(placing_XE, settings.k)
    # Where the norm is zero, no row matters.
    if len(c_XM) < settings.k:
        nothing_E = np.zeros(len(visits_E))
        return np.where(trajectory.norms_T[visits_E] == 0, np.inf, -np.inf), nothing_E, top_XE
    last_E = np.where(top_XE, placing_XE, np.inf).argmin(0)
    floor_E = placing_XE[last_E, np.arange(len(visits_E))]
    slack_E = TIE * np.vecdot(np.abs(c_XM[last_E]).astype(np.float64), weights_EM)
    return np.where(trajectory.norms_T[visits_E] == 0, np.inf, floor_E), slack_E, top_XE
