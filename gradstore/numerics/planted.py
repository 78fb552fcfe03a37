r"""Features with a planted structure: groups that are good or noisy, topics, and known contributors of every query.

The feature of example n in group j is the matrix

.. math:: F_{nj} = s_j \, L \, Z_{nj} \, R^T, \qquad
          Z_{nj} = E_{nj} + g_j \Big( a \, T_{j,t(n)} + b \sum_{q \in Q(n)} U_{jq} \Big)

[r_o, r_i], stored row by row. E is noise, drawn for every example and group; T_jt a direction of topic t, and t(n) the topic
of the example; U_jq a direction that belongs to query q alone. Q(n) of a query is itself; of a train example, the queries
that it contributes to: every query has ``contributors`` train examples of its own, of its topic. In good groups g = 1 and
s = 1; in noisy ones g = 0 and s = NOISY_SCALE, so that their noise drowns the good ones where gradients are compared as they
are and groups are weighted equally. A kernel that whitens each group takes that scale away, and leaves the noise.

In the good groups, before L and R colour it, E <F_q, F_n> is 0 for an example of another topic, a^2 v K for one of the
query's and (a^2 + b^2) v K for its contributors, with K = r_o r_i and v = 85/64 the variance of a draw; the sum over the M_g
good groups has noise of deviation v sqrt(M_g K). The strengths a and b make the ratio of signal to noise there
TOPIC_STRENGTH, and CONTRIBUTOR_STRENGTH more, whatever K and M_g, as far as multiples of 1/256 up to 2 can.

Aspects are sets of queries whose good groups are others: those that follow in the order of which the noisy ones are the
first. There alone are the U_jq of their queries; topics stay in the groups that are good for all others.

L = diag(1, 1/2, 1, 1/2, ...) (I + N/2), N the cyclic shift, and R the same of size r_i: so the covariance of the noise is
s^2 v (L L^T) (x) (R R^T), which EKFAC's Kronecker factors can hold and no diagonal can.

These are the gradients of f(x; W) = sum_j <W_j, F_j> for layers W_j, with positions t = 1 ... r_i: the layer's input is
x_t = R e_t and its output gradient D_t = s_j L Z_nj e_t. `gradstore.adapters.synthetic` is that model.

Draws are sums of four uniform digits of 4 bits, centred and divided by 8: -3.75 to 3.75 in steps of 1/8, near normal. All
factors are powers of two or multiples of 1/256, so every feature is a dyadic number of at most 24 bits, and float32 holds
it exactly: it has the same bits on every machine, in every batch, and whether it is drawn here or differentiated.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from gradstore.errors import SpecError
from gradstore.numerics.generator import WORDS_PER_COUNTER, derive_key, permutation, stretches, words

# B examples of a batch, M groups, O r_o, I r_i, T positions (as many as I), K features, Q queries, C contributors.

TRAIN = "train"
NOISY_SCALE = 2.0
TOPIC_STRENGTH = 3.0
CONTRIBUTOR_STRENGTH = 9.0
STRENGTH_STEPS = 256
MOST_STRENGTH = 2.0
NUMBERS_PER_WORD = 4
_DIGITS = np.uint64(0x0F0F0F0F0F0F0F0F)
_BYTES = np.uint64(0x00FF00FF00FF00FF)
_MEAN_OF_FOUR = np.float32(30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planting:
    """What is planted.

    Attributes
    ----------
    seed
        What every draw is derived from.
    groups
        Names of the M groups.
    shape
        (r_o, r_i) of every group's features.
    rows
        Examples of every set by its name: ``train``, and one or more sets of queries.
    topics
        Number of topics.
    contributors
        Train examples that every query has of its own.
    noisy
        Share of the groups that hold nothing but noise.
    aspects
        Names of the sets of queries whose good groups are others.
    """

    seed: int
    groups: tuple[str, ...]
    shape: tuple[int, int]
    rows: Mapping[str, int]
    topics: int
    contributors: int
    noisy: float
    aspects: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        queries = sum(count for name, count in self.rows.items() if name != TRAIN)
        if not 1 <= self.topics <= self.rows[TRAIN]:
            raise SpecError(
                f"topics: found {self.topics}; accepted: 1 to {self.rows[TRAIN]:,}, the rows of data.train."
            )
        if self.contributors < 0:
            raise SpecError(f"contributors: found {self.contributors}; accepted: 0 or more.")
        if self.contributors * queries > self.rows[TRAIN]:
            raise SpecError(
                f"contributors: found {self.contributors}; {queries:,} queries with as many of their own need "
                f"{self.contributors * queries:,} rows of data.train, which has {self.rows[TRAIN]:,}. Ask for more rows, or "
                "for fewer queries or contributors."
            )
        if not 0 <= self.noisy < 1 or round(self.noisy * len(self.groups)) == len(self.groups):
            raise SpecError(
                f"noisy: found {self.noisy}; accepted: a share from 0 to below 1 that leaves one of the "
                f"{len(self.groups):,} groups good."
            )


class Planted:
    """The planted features, drawn where they are asked for.

    Parameters
    ----------
    planting
        What is planted.

    Attributes
    ----------
    good
        Which groups are good.
    good_of
        By set, which groups are good for it: others than `good` for an aspect.
    topics
        By set, the topic of every example.
    contributors
        By set of queries, [Q, C], the train rows that contribute to each query.
    """

    good: Bool[np.ndarray, " M"]
    good_of: Mapping[str, Bool[np.ndarray, " M"]]
    topics: Mapping[str, Int64[np.ndarray, " rows"]]
    contributors: Mapping[str, Int64[np.ndarray, "Q C"]]

    def __init__(self, planting: Planting) -> None:
        self._planting = planting
        num_groups = len(planting.groups)
        order_M = permutation(words(self._key("structure", "groups"), num_groups))
        noisy = round(planting.noisy * num_groups)

        def good(turn: int) -> Bool[np.ndarray, " M"]:
            found = np.ones(num_groups, bool)
            found[np.roll(order_M, -turn * (num_groups - noisy))[:noisy]] = False
            return found

        self.good = good(0)
        turns = {name: turn for turn, name in enumerate(planting.aspects, start=1)}
        self.good_of = {name: good(turns.get(name, 0)) for name in planting.rows}
        self.topics = {name: self._topics(name, count) for name, count in planting.rows.items()}
        self.contributors = self._contributors()
        # By set of queries, which of them each train row contributes to; -1 for none.
        self._query_of = {name: np.full(planting.rows[TRAIN], -1) for name in self.contributors}
        for name, rows_QC in self.contributors.items():
            self.topics[TRAIN][rows_QC] = self.topics[name][:, None]
            self._query_of[name][rows_QC] = np.arange(len(rows_QC))[:, None]
        self.topic_strength = self._strength(TOPIC_STRENGTH)
        self.contributor_strength = self._strength(CONTRIBUTOR_STRENGTH)
        self._left_OO, self._right_II = (colouring(size) for size in planting.shape)

    @property
    def inputs(self) -> Float32[np.ndarray, "T I"]:
        """The inputs of every layer at all positions, x_t = R e_t: the rows of R^T."""
        return self._right_II.T

    def output_gradients(
        self, set_name: str, group: int, rows_B: Int64[np.ndarray, " B"]
    ) -> Float32[np.ndarray, "B O T"]:
        """D_t = s_j L Z e_t of some examples of a set at all positions t, in one group."""
        planting = self._planting
        name, features = planting.groups[group], math.prod(planting.shape)
        z_BK = draws(self._key(name, f"noise {set_name}"), rows_B, features)
        if self.good[group] and self.good_of[set_name][group]:
            topics_B = self.topics[set_name][rows_B]
            directions_UK = draws(self._key(name, "topics"), np.arange(planting.topics), features)
            directions_UK *= np.float32(self.topic_strength)
            z_BK += directions_UK[topics_B]
        self._add_own(z_BK, set_name, group, rows_B)
        scaled_OO = self._left_OO * np.float32(1 if self.good[group] else NOISY_SCALE)
        return np.asarray(np.matmul(scaled_OO, z_BK.reshape(-1, *planting.shape)), np.float32)

    def features(self, gradients_BOT: Float32[np.ndarray, "B O T"]) -> Float32[np.ndarray, "B K"]:
        """F = sum_t D_t x_t^T, row by row, of the output gradients of some examples."""
        batch, *_, positions = gradients_BOT.shape
        return np.asarray((gradients_BOT.reshape(-1, positions) @ self.inputs).reshape(batch, -1), np.float32)

    def covariances(
        self, gradients_BOT: Float32[np.ndarray, "B O T"]
    ) -> tuple[Float64[np.ndarray, "O O"], Float64[np.ndarray, "I I"], int]:
        """(sum D_t D_t^T, sum x_t x_t^T, positions), over the positions of all examples at which D_t is not zero."""
        outputs = gradients_BOT.shape[1]
        gradients_OP = np.ascontiguousarray(gradients_BOT.transpose(1, 0, 2)).reshape(outputs, -1)
        counts_T = gradients_BOT.any(1).sum(0)
        inputs_TI = self.inputs.astype(np.float64)
        left_OO = (gradients_OP @ gradients_OP.T).astype(np.float64)
        return left_OO, (inputs_TI.T * counts_T) @ inputs_TI, int(counts_T.sum())

    def _key(self, name: str, side: str) -> int:
        return derive_key(self._planting.seed, name, f"planted {side}")

    def _topics(self, set_name: str, count: int) -> Int64[np.ndarray, " rows"]:
        drawn = words(self._key("structure", f"topics {set_name}"), count)
        return (drawn % np.uint64(self._planting.topics)).astype(np.int64)

    def _contributors(self) -> dict[str, Int64[np.ndarray, "Q C"]]:
        """Of a permutation of the train rows the first belong to the first query, and so on."""
        planting = self._planting
        order = permutation(words(self._key("structure", "contributors"), planting.rows[TRAIN]))
        found, first = {}, 0
        for name, queries in planting.rows.items():
            if name != TRAIN:
                last = first + queries * planting.contributors
                found[name] = order[first:last].reshape(queries, planting.contributors)
                first = last
        return found

    def _strength(self, ratio: float) -> float:
        """The amplitude c with c^2 sqrt(M_g K) = ratio, as a multiple of 1/256 from there to 2."""
        good = int(self.good.sum())
        amplitude = math.sqrt(ratio / math.sqrt(good * math.prod(self._planting.shape)))
        return max(1, min(round(STRENGTH_STEPS * amplitude), STRENGTH_STEPS * MOST_STRENGTH)) / STRENGTH_STEPS

    def _add_own(
        self, z_BK: Float32[np.ndarray, "B K"], set_name: str, group: int, rows_B: Int64[np.ndarray, " B"]
    ) -> None:
        """Add to Z the directions of the queries that some examples are, or contribute to, where a group is good for them."""
        strength, features = np.float32(self.contributor_strength), z_BK.shape[1]
        name = self._planting.groups[group]
        if set_name != TRAIN:
            if self.good_of[set_name][group]:
                z_BK += strength * draws(self._key(name, f"own {set_name}"), rows_B, features)
            return
        for queries, query_N in self._query_of.items():
            places = np.flatnonzero(query_N[rows_B] >= 0)
            if len(places) and self.good_of[queries][group]:
                drawn = draws(self._key(name, f"own {queries}"), query_N[rows_B[places]], features)
                z_BK[places] += strength * drawn


def colouring(size: int) -> Float32[np.ndarray, "size size"]:
    """diag(1, 1/2, 1, ...) (I + N/2), with N e_k = e_(k-1) and N e_0 = e_(size-1): what L and R are."""
    shift = np.roll(np.eye(size, dtype=np.float32), 1, axis=1)
    scale = np.where(np.arange(size) % 2, 0.5, 1).astype(np.float32)
    return np.asarray(scale[:, None] * (np.eye(size, dtype=np.float32) + 0.5 * shift), np.float32)


def draws(key: int, rows_B: Int64[np.ndarray, " B"], count: int) -> Float32[np.ndarray, "B count"]:
    """Rows of a key's table of draws: each is ``count`` numbers, and begins at a counter of its own.

    Number i of a row is of the 16 bits i % 4 (least significant first) of the row's word i // 4: the sum of their four
    digits of 4 bits, less 30, by 8.
    """
    a_row = -(-count // NUMBERS_PER_WORD)
    counters = -(-a_row // WORDS_PER_COUNTER)
    runs = _runs(rows_B)
    counters_of = [(int(rows_B[first]) * counters, (int(rows_B[last - 1]) + 1) * counters) for first, last in runs]
    out_BN = np.empty((len(rows_B), NUMBERS_PER_WORD * a_row), np.float32)
    for (first, last), raw in zip(runs, stretches(key, counters_of), strict=True):
        digits = raw.reshape(last - first, -1)[:, :a_row]
        digits = (digits & _DIGITS) + ((digits >> np.uint64(4)) & _DIGITS)
        sums = (digits & _BYTES) + ((digits >> np.uint64(8)) & _BYTES)
        out_BN[first:last] = sums.astype("<u8", copy=False).view("<u2")
    out_BN -= _MEAN_OF_FOUR
    out_BN *= np.float32(1 / 8)
    return out_BN[:, :count]


def _runs(rows_B: Int64[np.ndarray, " B"]) -> list[tuple[int, int]]:
    """Places [first, last) of rows that follow one another."""
    edges = [0, *(np.flatnonzero(np.diff(rows_B) != 1) + 1).tolist(), len(rows_B)]
    return [(first, last) for first, last in pairwise(edges) if first < last]
