"""Contributions are inner products, in the order of the groups that were asked for."""

from __future__ import annotations

import numpy as np

from gradstore.numerics.contributions import contributions
from tests import oracle


def test_contributions_are_the_oracles_for_groups_of_different_widths() -> None:
    draw = np.random.default_rng(0)
    widths = {f"g{index}": 1 + index for index in range(5)}
    queries = {name: draw.standard_normal((3, width)).astype(np.float32) for name, width in widths.items()}
    rows = {name: draw.standard_normal((7, width)).astype(np.float32) for name, width in widths.items()}
    groups = ["g3", "g0", "g4"]

    found = contributions(queries, rows, groups)

    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    np.testing.assert_allclose(found, oracle.contributions(queries, rows, groups), rtol=1e-5, atol=1e-6)
