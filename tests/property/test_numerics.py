"""Batches, pads, pieces of rows and the order of groups never change the numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradstore.groups import Grouping
from gradstore.numerics.contributions import group_products
from gradstore.numerics.gradients import FeatureExtractor
from gradstore.numerics.kernel import GramSum
from gradstore.numerics.learner import LearnerSettings, learn_weights
from gradstore.numerics.projection import Logra
from tests.networks import language_case, language_outputs, sequences


class Language:
    """A language model and its extractor, made once for all examples that hypothesis draws."""

    def __init__(self, kind: str) -> None:
        case = language_case(kind, Grouping())
        self.model = case.model
        self.extractor = FeatureExtractor(case.model, case.groups, Logra(rank=4), seed=0)

    def features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        found = self.extractor(lambda: language_outputs(self.model, tokens, mask), examples=len(tokens))
        return torch.stack(list(found.features.values()), 1)


def contributions(queries: dict[str, np.ndarray], rows: dict[str, np.ndarray], groups: list[str]) -> np.ndarray:
    """C [Q, N, M] of some groups, in their order."""
    shape = len(rows[groups[0]]), len(groups), len(queries[groups[0]])
    portion = np.empty(shape, np.float32)
    group_products([queries[group] for group in groups], [rows[group] for group in groups], portion)
    return np.ascontiguousarray(portion.transpose(2, 0, 1))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def language(request: pytest.FixtureRequest) -> Language:
    return Language(request.param)


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(2, 10), min_size=2, max_size=6), pads=st.integers(0, 5))
def test_batch_mates_and_pads_never_change_a_row(language: Language, lengths: list[int], pads: int) -> None:
    tokens, mask = sequences(lengths, pads=pads)

    together = language.features(tokens, mask)

    for row, length in enumerate(lengths):
        alone = language.features(tokens[[row], :length], mask[[row], :length])[0]
        norms = torch.linalg.norm(alone, dim=1)
        error = torch.linalg.norm(together[row] - alone, dim=1)
        # A sequence of two tokens has no gradient in q_proj and k_proj: there, only rounding is left to compare.
        assert (error <= 1e-4 * norms.clamp(min=0.01 * float(norms.max()))).all()


@given(cuts=st.lists(st.integers(0, 40), max_size=5), seed=st.integers(0, 10))
def test_pieces_of_rows_never_change_gram_contributions_or_weights(cuts: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    groups = ["a", "b", "c"]
    rows = {group: draw.standard_normal((40, 6)).astype(np.float32) for group in groups}
    queries = {group: draw.standard_normal((3, 6)).astype(np.float32) for group in groups}
    bounds = [0, *sorted(cuts), 40]
    pieces = [slice(start, stop) for start, stop in pairwise(bounds)]
    whole_gram, gram = GramSum(6), GramSum(6)
    whole_c = contributions(queries, rows, groups)
    learner = LearnerSettings(k=4, epochs=3, learning_rate=0.05)

    whole_gram.add(rows["a"])
    for piece in pieces:
        gram.add(rows["a"][piece])
    parts = [contributions(queries, {name: rows[name][piece] for name in groups}, groups) for piece in pieces]
    whole = learn_weights(lambda query: [whole_c[query]], num_queries=3, num_groups=3, settings=learner)
    found = learn_weights(
        lambda query: (whole_c[query, piece] for piece in pieces), num_queries=3, num_groups=3, settings=learner
    )

    np.testing.assert_allclose(gram.total(), whole_gram.total(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole_c, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.weights, whole.weights, rtol=1e-12)
    np.testing.assert_allclose(found.losses, whole.losses, rtol=1e-12)


@given(order=st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_groups_never_changes_scores(order: list[str]) -> None:
    draw = np.random.default_rng(0)
    rows = {group: draw.standard_normal((8, 5)).astype(np.float32) for group in "abcd"}
    queries = {group: draw.standard_normal((2, 5)).astype(np.float32) for group in "abcd"}
    weights = dict(zip("abcd", (0.1, 0.2, 0.3, 0.4), strict=True))

    found = contributions(queries, rows, order) @ np.array([weights[group] for group in order])

    expected = contributions(queries, rows, list("abcd")) @ np.array(list(weights.values()))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
